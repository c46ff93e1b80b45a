"""The network: the loopback, and a hub that answers, refuses, hangs or is not there."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tenon.service.network import hub_endpoint, measure_loopback, reach_hub


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(200 if self.path == "/" else 403)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        """Silent."""


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_the_loopback_works_here() -> None:
    link = measure_loopback(payload_bytes=1_000_000)
    assert link.problem == "" and link.seconds is not None and link.seconds < 1
    assert link.bytes_per_second is not None and link.bytes_per_second > 1_000_000


@pytest.mark.parametrize("path", ["/", "/private"])
def test_a_hub_that_answers_is_reached_whatever_it_says(server: str, path: str) -> None:
    link = reach_hub(server + path)
    assert link.problem == "" and link.seconds is not None


def test_a_hub_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert "refused" in reach_hub(f"http://127.0.0.1:{port}").problem


def test_a_hub_that_hangs_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        link = reach_hub(f"http://127.0.0.1:{silent.getsockname()[1]}", wait_seconds=0.2)
    assert link.problem and time.monotonic() - started < 3


def test_a_bad_endpoint_is_a_sentence() -> None:
    assert reach_hub("no url").problem


def test_the_endpoint_is_the_hub_package_s() -> None:
    assert hub_endpoint().startswith("https://")
