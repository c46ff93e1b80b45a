"""The real command over the real worker: it says where it listens, and ends in good order."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
import pytest
from openai import OpenAI

from tests.serve.house import LONG, House, read_stream, wait_until


@contextmanager
def command(house: House, *words: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """`tenon serve`, and its `ready` event. Nothing of it is left afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tenon.cli.main", "serve", "--port", "0", "--context", "256", "--json", *words],
        cwd=house.world.root, env={**house.world.environment, "TENON_THREADS": "2"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield process, json.loads(line)
    finally:
        process.kill()
        process.wait()


def reachable(port: int) -> bool:
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_runs_finish_and_the_exit_status_is_0(house: House, number: signal.Signals) -> None:
    with command(house, "base") as (process, ready):
        assert ready["name"] == "base" and ready["context_tokens"] == 256
        port = int(ready["url"].rpartition(":")[2])
        with OpenAI(base_url=f"{ready['url']}/v1", api_key="none") as client:
            found = client.chat.completions.create(
                model="low", messages=[{"role": "user", "content": "the house"}], max_tokens=5, temperature=0
            )
            assert found.model == "low@1"
        connection = HTTPConnection("127.0.0.1", port, timeout=30)
        body = json.dumps({"model": "high", "stream": True, **LONG}).encode()
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.readline().startswith(b"data: ")
        process.send_signal(number)
        if number == signal.SIGTERM:  # as supervisors do: to every process of the group, and again
            for child in psutil.Process(process.pid).children():
                child.send_signal(number)
            process.send_signal(number)
        assert read_stream(answer)[-1]["choices"][0]["finish_reason"] == "length"
        connection.close()
        assert process.wait(timeout=20) == 0
        assert not reachable(port)
    assert list((house.world.root / "home" / "logs").glob("serve-*")) == []


@pytest.mark.slow
def test_sigterm_under_load_finishes_what_runs_and_takes_nothing_new(house: House, tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    with command(house, "base", "--drain", "120", "--log", str(log)) as (process, ready):
        port = int(ready["url"].rpartition(":")[2])
        headers = {"Content-Type": "application/json"}
        streams, told, over = [], [], threading.Event()
        for model in ("base", "low", "high", "low"):
            connection = HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("POST", "/v1/completions", json.dumps({"model": model, "stream": True, **LONG}), headers)
            streams.append((connection, connection.getresponse()))
            assert streams[-1][1].readline().startswith(b"data: ")

        def hammer() -> None:
            while not over.wait(0.05):
                connection = HTTPConnection("127.0.0.1", port, timeout=60)
                try:
                    connection.request("POST", "/v1/completions", json.dumps({"model": "low", "prompt": "x"}), headers)
                    told.append(connection.getresponse().status)
                except OSError:
                    told.append(0)  # nobody listens any more
                finally:
                    connection.close()

        hammering = [threading.Thread(target=hammer, daemon=True) for _ in range(4)]
        for thread in hammering:
            thread.start()
        process.send_signal(signal.SIGTERM)
        for connection, stream in streams:
            assert read_stream(stream)[-1]["choices"][0]["finish_reason"] == "length"
            connection.close()
        assert process.wait(timeout=120) == 0
        over.set()
        for thread in hammering:
            thread.join()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert log.stat().st_mode & 0o077 == 0
    assert set(told) <= {200, 503, 0} and 503 in told
    # Every answer that somebody got is in the log, and nothing else.
    finished = [line for line in lines if line["status"] == 200]
    assert len(finished) == told.count(200) + 4 and len([line for line in lines if line.get("stream") is True]) == 4
    assert sum(line["status"] == 503 for line in lines) == told.count(503)
    assert "the lake" not in json.dumps(lines)


def test_a_server_is_managed_on_a_port_of_its_own(house: House) -> None:
    made = house.world.tenon("keys", "create", "ops", "--manage", "--json")
    typed = json.loads(made.stdout)["key"]
    try:
        with command(house, "base", "--manage", "0") as (process, ready):
            port = int(ready["manage"].rpartition(":")[2])
            assert ready["manage"].startswith("http://127.0.0.1:") and ready["manage"] != ready["url"]
            connection = HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("POST", "/v1/adapters/high@1/load", headers={"Authorization": f"Bearer {typed}"})
            answer = connection.getresponse()
            assert answer.status == 200 and json.loads(answer.read())["state"] == "resident"
            connection.request("POST", "/v1/server/drain", headers={"Authorization": f"Bearer {typed}"})
            assert connection.getresponse().status == 202
            assert process.wait(timeout=60) == 0
            connection.close()
    finally:
        house.world.tenon("keys", "revoke", json.loads(made.stdout)["id"])


def test_a_server_whose_command_is_killed_ends_too(house: House) -> None:
    with command(house, "recipe.yaml") as (process, ready):
        os.kill(process.pid, signal.SIGKILL)
        port = int(ready["url"].rpartition(":")[2])
        wait_until(lambda: not reachable(port), seconds=20)


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(house: House) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = house.world.tenon("serve", "base", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 2 and "error[usage-address]" in done.stderr and "--port 0" in done.stderr
    assert "loading the base" not in done.stderr


def test_a_cache_that_holds_no_sequence_is_refused(house: House) -> None:
    done = house.world.tenon("serve", "base", "--port", "0", "--cache", "1kB")
    assert done.returncode == 1 and "error[plan-cache]" in done.stderr and "--cache" in done.stderr


def test_several_engines_behind_one_front(house: House) -> None:
    """Two engines answer as one does; one that is killed is replaced, and SIGTERM lets what runs finish."""
    with command(house, "base", "--replicas", "2", "--slots", "2", "--drain", "200") as (process, ready):
        assert ready["replicas"] == 2 and ready["rows"] == 32
        port = int(ready["url"].rpartition(":")[2])
        (front,) = psutil.Process(process.pid).children()
        engines = front.children()
        assert len(engines) == 2
        with OpenAI(base_url=f"{ready['url']}/v1", api_key="none") as client:
            for name in ("low", "high", None):
                ids = [5, 40, 90, 12]
                (expected,) = house.expected([ids], [name], max_new_tokens=20, stop_ids=frozenset())
                found = client.completions.create(
                    model=name or "base", prompt=ids, max_tokens=20, temperature=0, extra_body={"ignore_eos": True}
                )
                assert found.choices[0].text == house.decode(expected.ids)
            assert {model.id for model in client.models.list() if model.model_dump()["state"] == "resident"} > {"base"}
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        body = json.dumps({"model": "high", "stream": True, **LONG}).encode()
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.readline().startswith(b"data: ")
        with urlopen(f"{ready['url']}/metrics") as metrics:
            told = dict(re.findall(r'tenon_replica_sequences\{replica="(\d)"\} (\S+)', metrics.read().decode()))
        assert sorted(told.values()) == ["0.0", "1.0"]
        sorted(engines, key=lambda engine: engine.pid)[int(told["1"] == "1.0")].kill()
        for target in (process.pid, front.pid, *(child.pid for child in front.children())):
            os.kill(target, signal.SIGTERM)
        assert read_stream(answer)[-1]["choices"][0]["finish_reason"] == "length"
        connection.close()
        assert process.wait(timeout=60) == 0
        assert not reachable(port)


def test_engines_that_cannot_start_say_why(house: House) -> None:
    with (
        pytest.raises(AssertionError, match=r"(?s)error\[plan-cache\].*--cache"),
        command(house, "base", "--replicas", "2", "--cache", "1kB"),
    ):
        pass
    done = house.world.tenon("serve", "base", "--port", "0", "--replicas", "many")
    assert done.returncode == 2 and "error[usage-replicas]" in done.stderr
