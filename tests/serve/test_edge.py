"""The HTTP edge, over real sockets: clients that dawdle, talk nonsense, or do not read. Everybody else is served."""

from __future__ import annotations

import gc
import json
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import psutil
import pytest

from tenon.serve.http.connections import Bounds
from tests.serve.house import LONG, House, Running, serving, wait_until

SHORT = Bounds(header_seconds=0.5, body_seconds=0.7, stalled_seconds=1.0, linger_seconds=0.5)
# Each of its tokens is told with the twenty likeliest: some 1.5 kB.
WORDY = {"model": "base", "stream": True, "logprobs": 20, **LONG}
LONG_FRACTION = "0." + "1" * 5000
ORIGIN = "https://chat.example.org"


@pytest.fixture(scope="module")
def strict(house: House) -> Iterator[Running]:
    with serving(house, bounds=SHORT, cors=(ORIGIN,), queue=256, most_body_bytes=4 << 20) as started:
        yield started


def raw(running: Running, *, small: bool = False) -> socket.socket:
    """A connection to write bytes on. small: what the client's side holds is next to nothing."""
    opened = socket.socket()
    if small:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    opened.settimeout(20)
    opened.connect((running.host, running.port))
    return opened


def head(path: str, *headers: str, method: str = "POST") -> bytes:
    lines = (f"{method} {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *headers)
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def asked(fields: dict[str, Any], *headers: str) -> bytes:
    body = json.dumps(fields).encode()
    return head("/v1/completions", f"Content-Length: {len(body)}", *headers) + body


def read_all(opened: socket.socket) -> bytes:
    """What comes until the other side has closed, in whichever way."""
    found = b""
    try:
        while data := opened.recv(1 << 16):
            found += data
    except ConnectionResetError:
        pass
    return found


def read_until(opened: socket.socket, wanted: bytes) -> bytes:
    """What comes, as far as the wanted bytes."""
    found = b""
    while wanted not in found:
        data = opened.recv(1 << 16)
        assert data, found
        found += data
    return found


def drip(opened: socket.socket, data: bytes) -> float:
    """Write a byte at a time until it is all written or the other side has closed; how many seconds that took."""
    began = time.monotonic()
    try:
        for at in range(len(data)):
            opened.sendall(data[at : at + 1])
            time.sleep(0.05)
    except (ConnectionResetError, BrokenPipeError):
        pass
    return time.monotonic() - began


@pytest.mark.parametrize("first", [b"", head("/health", method="GET")])
def test_a_header_that_comes_too_slowly_is_cut_off(strict: Running, first: bytes) -> None:
    with raw(strict) as slow:
        slow.sendall(first)
        if first:
            assert read_until(slow, b'{"status":"ok"}')
        assert drip(slow, b"GET /health HTTP/1.1\r\nHost: " + b"x" * 100) < 3
        assert read_all(slow) == b""


def test_a_client_that_says_nothing_is_cut_off_and_one_that_paused_between_requests_is_not(strict: Running) -> None:
    with raw(strict) as silent, raw(strict) as pausing:
        pausing.sendall(head("/health", method="GET"))
        read_until(pausing, b'{"status":"ok"}')
        began = time.monotonic()
        assert read_all(silent) == b"" and time.monotonic() - began < 3
        time.sleep(0.5)
        pausing.sendall(head("/health", "Connection: close", method="GET"))
        assert b'{"status":"ok"}' in read_all(pausing)


def test_a_body_that_comes_too_slowly_is_told_so(strict: Running) -> None:
    with raw(strict) as slow:
        slow.sendall(head("/v1/completions", "Content-Length: 500"))
        drip(slow, b"{" + b" " * 30)
        answer = read_all(slow)
    assert answer.startswith(b"HTTP/1.1 408") and b'"error"' in answer
    # An answer that takes long is not a body that does.
    assert strict.ask("/v1/completions", {"model": "base", **LONG})[0] == 200


def test_a_body_that_goes_on_after_its_answer_is_thrown_away_and_then_cut_off(strict: Running) -> None:
    with raw(strict) as stubborn:
        stubborn.sendall(head("/v1/completions", f"Content-Length: {10**9}"))
        assert stubborn.recv(1 << 16).startswith(b"HTTP/1.1 413")
        assert drip(stubborn, b"x" * 200) < 4


@pytest.mark.parametrize("last", [("Connection: close",), ()])
def test_a_body_that_is_refused_early_does_not_cost_the_client_the_answer(
    strict: Running, last: tuple[str, ...]
) -> None:
    """The socket must not be reset for what was still on its way: a reset overtakes the answer."""
    with raw(strict) as large:
        large.sendall(head("/v1/completions", f"Content-Length: {5 << 20}", *last))
        for _ in range(40):  # slowly, so that the answer is there first
            large.sendall(b"x" * ((5 << 20) // 40))
            time.sleep(0.005)
        answer = large.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 413") and b'"error"' in answer


def test_expect_100_continue(strict: Running) -> None:
    body = json.dumps({"model": "base", "prompt": "the", "max_tokens": 1}).encode()
    with raw(strict) as polite:
        polite.sendall(head("/v1/completions", f"Content-Length: {len(body)}", "Expect: 100-continue"))
        assert polite.recv(1 << 16).startswith(b"HTTP/1.1 100")
        polite.sendall(body)
        assert polite.recv(1 << 16).startswith(b"HTTP/1.1 200")
    with raw(strict) as polite:
        polite.sendall(head("/v1/completions", f"Content-Length: {10**8}", "Expect: 100-continue"))
        assert polite.recv(1 << 16).startswith(b"HTTP/1.1 413"), "before anything is sent"


def test_requests_in_a_row_without_waiting_are_answered_in_their_order(strict: Running) -> None:
    one = {"model": "base", "prompt": "the lake", "max_tokens": 3}
    with raw(strict) as eager:
        eager.sendall(asked(one) + head("/health", method="GET") + head("/none", "Connection: close", method="GET"))
        answer = read_all(eager).decode()
    places = [answer.find(text) for text in ("text_completion", '{"status":"ok"}', "HTTP/1.1 404")]
    assert -1 not in places and places == sorted(places)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 300 + b"\r\n\r\n",  # TLS where none is spoken
        b"nonsense\r\n\r\n",
        head("/health", "X: " + "y" * 1_000_000, method="GET"),
        head("/v1/completions", "Content-Length: -1"),
        head("/v1/completions", "Content-Length: 1", "Content-Length: 2"),
        head("/v1/completions", "Transfer-Encoding: chunked") + b"zz\r\nx\r\n",
        head("/v1/completions", "Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nBad Name: y\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",  # no host
    ],
)
def test_what_is_not_http_gets_400_or_501_and_is_cut_off(strict: Running, data: bytes) -> None:
    with raw(strict) as odd:
        odd.sendall(data)
        answer = read_all(odd)
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 501")), answer[:200]
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert strict.ask("/health")[0] == 200


def test_head_and_options(strict: Running) -> None:
    with raw(strict) as asking:
        asking.sendall(head("/health", "Connection: close", method="HEAD"))
        answer = read_all(asking)
    assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"\r\n\r\n") and b"content-length: 15" in answer
    with raw(strict) as asking:
        asking.sendall(head("/v1/completions", "Connection: close", method="OPTIONS"))
        answer = read_all(asking)
    assert answer.startswith(b"HTTP/1.1 405") and b"allow: POST" in answer


def test_other_origins_are_let_in_only_when_they_are_named(strict: Running, running: Running) -> None:
    def preflight(server: Running, origin: str) -> dict[str, str]:
        connection = server.connect()
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        connection.request("OPTIONS", "/v1/chat/completions", headers=headers)
        found = {name.lower(): value for name, value in connection.getresponse().getheaders()}
        connection.close()
        return found

    assert preflight(strict, ORIGIN)["access-control-allow-origin"] == ORIGIN
    assert "access-control-allow-origin" not in preflight(strict, "https://other.example.org")
    assert not [name for name in preflight(running, ORIGIN) if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("brought", "kept"),
    [("trace-7:A_b.9", True), ("", False), ("a b", False), ("x" * 129, False), ('"}{', False), ("\xe9", False)],
)
def test_a_request_has_the_name_that_it_brings_if_that_is_a_plain_one(
    strict: Running, brought: str, kept: bool
) -> None:
    connection = strict.connect()
    connection.request("GET", "/v1/nothing", headers={"X-Request-Id": brought})
    answer = connection.getresponse()
    assert answer.status == 404
    name = answer.getheader("X-Request-Id") or ""
    assert (name == brought) is kept and (kept or (name.startswith("req-") and len(name) == 28))
    connection.close()


@pytest.mark.parametrize(
    "data",
    [
        b'{"model": "base", "prompt": [' + b"{}," * 1_000_000 + b"{}]}",
        b'{"model": "base", "messages": [' + b"0," * 1_500_000 + b"0]}",
        b'{"model": "base", "stop": [' + b"0," * 1_500_000 + b"0]}",
        b'{"model": "base", "messages": [{"role": "user", "content": [' + b"0," * 1_500_000 + b"0]}]}",
        b"{" + b",".join(b'"k%d": 0' % n for n in range(300_000)) + b"}",
        b'{"model": "base", "logit_bias": {' + b",".join(b'"%d": []' % n for n in range(300_000)) + b"}}",
        b'{"model": "base", "metadata": {' + b",".join(b'"%d": 1' % n for n in range(300_000)) + b"}}",
    ],
)
def test_a_body_with_very_many_faults_costs_little(strict: Running, data: bytes) -> None:
    route = "/v1/chat/completions" if b"messages" in data or b"metadata" in data else "/v1/completions"
    gc.collect()
    gc.freeze()  # as in a server: what hundreds of tests left in this process is not for the body to be searched with
    try:
        cpu_seconds = time.process_time()
        status, body = strict.ask(route, data)
        cpu_seconds = time.process_time() - cpu_seconds
    finally:
        gc.unfreeze()
    assert status == 400 and len(json.dumps(body)) < 5000
    assert cpu_seconds < 2.0, "of four megabytes"


@pytest.mark.parametrize("depth", [50, 900, 20_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_what_is_nested_deeply_is_refused_or_answered(strict: Running, depth: int, opening: str, closing: str) -> None:
    inner = opening * depth + "1" + closing * depth
    talk = '"messages": [{"role": "user", "content": "x"}]'
    call = '"messages": [{"role": "assistant", "tool_calls": [{"a": INNER}]}]'
    for fields in (f'{talk}, "tools": [INNER]', call, f'{talk}, "logit_bias": INNER'):
        body = f'{{"model": "base", "max_tokens": 1, {fields.replace("INNER", inner)}}}'
        assert strict.ask("/v1/chat/completions", body.encode())[0] in (200, 400), fields


@pytest.mark.parametrize(
    "number",
    [
        "1e999",
        "-1e999",
        "1" * 5000,
        "1" * 30,
        "-" + "1" * 30,
        str(2**63),
        "NaN",
        "Infinity",
        "1e-999",
        LONG_FRACTION,
        "0." + "1" * 5000,
    ],
)
@pytest.mark.parametrize(
    "field",
    ["temperature", "max_tokens", "seed", "top_p", "top_k", "min_p", "n", "logprobs", "presence_penalty",
     "frequency_penalty", "repetition_penalty"],
)  # fmt: skip
def test_numbers_of_any_size_are_refused_or_answered(strict: Running, field: str, number: str) -> None:
    for limits in ("", ', "top_p": 0.9', ', "temperature": 0'):
        body = f'{{"model": "base", "prompt": "the", "max_tokens": 1, "{field}": {number}{limits}}}'
        assert strict.ask("/v1/completions", body.encode())[0] in (200, 400), body
    assert strict.ask("/v1/completions", {"model": "base", "prompt": "the", "max_tokens": 1})[0] == 200


@pytest.mark.parametrize("number", ["1" * 30, "-" + "1" * 30, str(2**63), str(2**31), "-1"])
def test_ids_of_any_size_are_refused(strict: Running, number: str) -> None:
    asked = [
        ("/v1/completions", f'"prompt": [{number}]'),
        ("/v1/completions", f'"prompt": "x", "logit_bias": {{"{number}": 1}}'),
        ("/v1/embeddings", f'"input": [{number}]'),
        ("/v1/embeddings", f'"input": "x", "dimensions": {number}'),
        ("/detokenize", f'"tokens": [{number}]'),
        ("/v1/chat/completions", f'"messages": [{{"role": "user", "content": "x"}}], "top_logprobs": {number}'),
    ]
    for route, fields in asked:
        assert strict.ask(route, f'{{"model": "base", {fields}}}'.encode())[0] == 400, (route, fields)
    assert strict.ask("/v1/completions", {"model": "base", "prompt": "the", "max_tokens": 1})[0] == 200


def test_what_a_client_wrote_is_not_told_back_in_megabytes(strict: Running) -> None:
    for model in ("x" * 90_000, "low@" + "9" * 90_000):
        status, body = strict.ask("/v1/completions", {"model": model, "prompt": "x"})
        assert status == 404 and len(body["error"]["message"]) < 2200
    status, body = strict.ask("/v1/completions", {"model": "base", "prompt": "x", "k" * 90_000: 1})
    assert status == 400 and len(json.dumps(body)) < 5000


def test_a_client_that_does_not_read_holds_no_row_and_is_cut_off(strict: Running) -> None:
    engine, gate = strict.server.engine, strict.server.gate
    with raw(strict, small=True) as deaf:
        deaf.sendall(asked({**WORDY, "n": 8}))
        wait_until(lambda: gate.open == 8)
        wait_until(lambda: engine.load.running + engine.load.waiting == 0, seconds=30)
        # All is made, though nothing was taken; what is not taken yet is bounded by what was asked for.
        assert strict.ask("/v1/completions", {"model": "low", "prompt": "the", "max_tokens": 2})[0] == 200
        wait_until(lambda: gate.open == 0, seconds=10)
        assert b"[DONE]" not in read_all(deaf)
    with raw(strict, small=True) as slow:
        slow.sendall(asked({**WORDY, "n": 2}, "Connection: close"))
        found = b""
        while data := slow.recv(1 << 14):
            found += data
            time.sleep(0.01)
        assert b"[DONE]" in found, "who reads slowly, but reads, gets all of it"


def test_an_answer_that_is_never_taken_does_not_keep_its_connection(strict: Running) -> None:
    """All of it is written and the server is done with it, but the last of it waits to be taken."""
    with raw(strict, small=True) as deaf:
        deaf.sendall(asked({**WORDY, "n": 2, "stream": False, "max_tokens": 100}, "Connection: close"))
        wait_until(lambda: strict.server.gate.open == 2)
        wait_until(lambda: strict.server.gate.open == 0, seconds=30)
        wait_until(lambda: not connected(strict, deaf), seconds=10)


def connected(running: Running, client: socket.socket) -> bool:
    """Whether the server still has the connection."""
    mine = client.getsockname()[1]
    held = [each for each in psutil.Process().net_connections("tcp") if each.laddr.port == running.port]  # pyright: ignore
    return any(each.raddr and each.raddr.port == mine and each.status != "LISTEN" for each in held)


@pytest.mark.slow
def test_a_thousand_connections_that_do_not_read(house: House) -> None:
    """Memory stays bounded, others are served, and in the end nothing is left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    try:
        with serving(house, rows=32, queue=2000, bounds=Bounds(stalled_seconds=3.0)) as running, ExitStack() as stack:
            process = psutil.Process()
            running.ask("/v1/completions", {"model": "base", "prompt": "the", "max_tokens": 2})
            before = process.memory_info().rss
            for _ in range(1000):
                deaf = stack.enter_context(raw(running, small=True))
                deaf.sendall(asked({**WORDY, "max_tokens": 24}))
            wait_until(lambda: running.server.gate.open > 0)
            assert running.ask("/v1/models")[0] == 200, "asked while they come, so it is answered when all have come"
            began = time.monotonic()
            assert running.ask("/health")[0] == 200 and running.server.gate.open > 0
            assert time.monotonic() - began < 5
            wait_until(lambda: running.server.gate.open == 0, seconds=120)
            grown = process.memory_info().rss - before
            assert grown < 300e6, f"{grown / 1e6:.0f} MB for a thousand"
            assert running.ask("/v1/completions", {"model": "low", "prompt": "the", "max_tokens": 2})[0] == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
