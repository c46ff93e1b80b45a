"""Jobs and passes as lines: what arrives is what was sent."""

from __future__ import annotations

import json
import math
import os

import pytest

from tenon.errors import AdapterError
from tenon.infer.requests import Completion, Request, Token
from tenon.serve.jobs import AdapterRef, Ended, Failed, Load, Waits
from tenon.serve.pool.job_lines import (
    AskedCancel,
    AskedJob,
    Pass,
    add_event,
    cancel_line,
    job_line,
    pass_fields,
    read_asked,
    read_pass,
)
from tenon.serve.pool.line_pipe import LinePipe

TOP = ((5, -0.25), (9, -math.inf))


@pytest.mark.parametrize(
    "request_",
    [
        Request([5]),
        Request(
            (1, 2, 3), max_new_tokens=7, stop_ids=frozenset({2, 9}), temperature=0.7, top_p=0.9, top_k=5, min_p=0.01,
            seed=2**63 - 1, top_logprobs=3, prompt_logprobs=True, adapter_key="k", salt="tenant\u2028é", draft_ids=(4,),
            answered=((8, -0.1), (7, -2.5)),
        ),
    ],
)  # fmt: skip
def test_a_job_arrives_as_it_was_sent(request_: Request) -> None:
    line = job_line(3, request_, AdapterRef("key", "name@3"))
    assert "\n" not in line
    found = read_asked(line)
    assert isinstance(found, AskedJob) and (found.number, found.adapter) == (3, AdapterRef("key", "name@3"))
    for field in Request.__dataclass_fields__:
        came, went = getattr(found.request, field), getattr(request_, field)
        # A sequence is one, whether tuple or list.
        assert came == went or list(came) == list(went), field
    bare = read_asked(job_line(3, request_, None))
    assert isinstance(bare, AskedJob) and bare.adapter is None
    assert read_asked(cancel_line(8)) == AskedCancel(8)


def test_a_pass_arrives_as_it_was_told() -> None:
    told = Pass(began=[1], load=Load(running=2, cache_used=0.1), loads=4, resident=frozenset({"a", "b"}))
    add_event(told, 1, Token(7, -0.123456789012345678, TOP))
    add_event(told, 2, Token(8, -1e-30))
    end = Completion((7,), (-0.5,), "stop", (-0.25,), (Token(3, -0.5, TOP), Token(4, -math.inf)))
    add_event(told, 1, Ended(end, Waits(0.25, 1.5)))
    add_event(told, 3, Ended(Completion((), (), "cancelled")))
    add_event(told, 2, Failed(AdapterError("adapter-damaged", "w", got="g", hint="h")))
    found = read_pass(json.loads(json.dumps({"kind": "pass", **pass_fields(told)})))
    assert (found.began, found.said, found.load, found.loads) == (told.began, told.said, told.load, told.loads)
    assert found.resident == told.resident
    assert found.ended == [  # the tokens were said
        (1, Ended(Completion((), (), "stop", end.draft_logprobs, end.prompt), Waits(0.25, 1.5))),
        (3, Ended(Completion((), (), "cancelled"))),
    ]
    ((number, error),) = found.failed
    assert number == 2 and isinstance(error, AdapterError) and (error.what, error.got, error.hint) == ("w", "g", "h")


def test_a_pass_of_nothing_is_short() -> None:
    assert pass_fields(Pass()) == {}
    assert read_pass({}) == Pass()
    assert pass_fields(Pass(resident=frozenset())) == {"resident": []}, "none is not unknown"


def test_lines_of_any_length_pass_a_pipe_that_nobody_waits_for() -> None:
    reading, theirs = os.pipe()
    far, writing = os.pipe()
    pipe = LinePipe(reading=reading, writing=writing)
    long = "x" * 300_000
    pipe.send(long)
    pipe.send("é")
    assert pipe.pending, "a pipe holds less"
    got = b""
    while not got.endswith("é\n".encode()):
        got += os.read(far, 100_000)
        pipe.flush()
    assert not pipe.pending and got == f"{long}\né\n".encode()
    os.write(theirs, b"one\ntwo\nth")
    assert pipe.receive() == [b"one", b"two"] and not pipe.ended
    os.write(theirs, b"ree\n")
    assert pipe.receive() == [b"three"]
    os.close(theirs)
    assert pipe.receive() == [] and pipe.ended
    os.close(far)
    pipe.send("to nobody")
    assert not pipe.pending
    os.close(reading)
    os.close(writing)
    pipe.shut()
    pipe.send("never")
