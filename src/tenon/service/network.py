"""Whether the network works: the loopback, which several processes of a run need, and the hub, unless offline.

Every wait is bounded and nothing raises: what does not work is a sentence. This module does not know what the network
is for.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress

from tenon.values import Value

WAIT_SECONDS = 5.0
_PAYLOAD_BYTES = 32 * 1024**2
_PIECE_BYTES = 1024**2


class Link(Value):
    """A connection that was tried. seconds: of one round trip; bytes_per_second: None when it was not measured.

    problem: why it does not work; "" when it does. target: what was asked.
    """

    target: str
    seconds: float | None = None
    bytes_per_second: float | None = None
    problem: str = ""


def measure_loopback(*, payload_bytes: int = _PAYLOAD_BYTES, wait_seconds: float = WAIT_SECONDS) -> Link:
    """Send so many bytes from this process to itself over 127.0.0.1."""
    target = "127.0.0.1"
    try:
        with socket.create_server((target, 0)) as server:
            server.settimeout(wait_seconds)
            echo = threading.Thread(target=_sink, args=(server, payload_bytes, wait_seconds), daemon=True)
            echo.start()
            with socket.create_connection(server.getsockname(), timeout=wait_seconds) as client:
                seconds = _round_trip(client)
                started = time.monotonic()
                client.sendall(bytes(payload_bytes))
                client.recv(1)
                rate = payload_bytes / max(time.monotonic() - started, 1e-9)
    except OSError as error:
        return Link(target=target, problem=str(error) or type(error).__name__)
    return Link(target=target, seconds=seconds, bytes_per_second=rate)


def reach_hub(endpoint: str, *, wait_seconds: float = WAIT_SECONDS) -> Link:
    """Ask the hub for nothing but its headers. Any answer counts: also one that refuses."""
    answers: queue.Queue[Link] = queue.Queue()
    # A name server that does not answer is waited for longer than any timeout of ours: so in a thread.
    threading.Thread(target=lambda: answers.put(_ask(endpoint, wait_seconds)), daemon=True).start()
    try:
        return answers.get(timeout=wait_seconds + 1)
    except queue.Empty:
        return Link(target=endpoint, problem=f"no answer within {wait_seconds:g} s")


def hub_endpoint() -> str:
    """Where the hub's package would ask; "" when it is not installed."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return ""
    return constants.ENDPOINT


def _ask(endpoint: str, wait_seconds: float) -> Link:
    started = time.monotonic()
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=wait_seconds):
            pass
    except urllib.error.HTTPError as error:
        error.close()
    except (OSError, ValueError) as error:  # URLError is an OSError; a bad endpoint is a ValueError
        return Link(target=endpoint, problem=str(error) or type(error).__name__)
    return Link(target=endpoint, seconds=time.monotonic() - started)


def _sink(server: socket.socket, payload_bytes: int, wait_seconds: float) -> None:
    """The other end: answer one byte, take the payload, answer one byte."""
    with suppress(OSError):
        connection, _ = server.accept()
        with connection:
            connection.settimeout(wait_seconds)
            connection.sendall(connection.recv(1))
            left = payload_bytes
            while left > 0 and (piece := connection.recv(_PIECE_BYTES)):
                left -= len(piece)
            connection.sendall(b"!")


def _round_trip(client: socket.socket) -> float:
    started = time.monotonic()
    client.sendall(b"?")
    client.recv(1)
    return time.monotonic() - started
