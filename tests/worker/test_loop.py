"""What every worker process does around its work, tried with the fake pipeline and with none at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tenon.bases.facts import ModelFacts, RopeFacts
from tenon.plan.requests import ChatStart, ChatTurn, Engine, GenerateRequest, Prompt, Sampling, Subject
from tenon.plan.values import BasePlan, MachineFacts
from tenon.settings import Settings, child_environment

FACTS = ModelFacts(
    family="llama", layers=1, hidden=8, heads=2, kv_heads=1, head_dim=4, feed_forward=16, vocab=32, context_tokens=64,
    norm_eps=1e-5, rope=RopeFacts(), tied_head=True, rotary_layers=(True,), window_layers=(0,),
)  # fmt: skip
MACHINE = MachineFacts(
    device="cpu", device_name="CPU", device_count=1, device_memory_bytes=1, host_memory_bytes=1, cores=1, threads=1,
    bf16=False, free_disk_bytes=1,
)  # fmt: skip
ENGINE = Engine(base=BasePlan(spec="none", path="/none", base_hash="0" * 64, facts=FACTS), machine=MACHINE)
BASE = Subject(label="base")


def run_worker(
    settings: Settings, *words: str, text: str = "", module: str = "tenon.worker.fake"
) -> tuple[int, list, str]:
    """Exit status, events, and what went to standard error."""
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        env=child_environment(settings), input=text, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def turn(text: str) -> ChatTurn:
    return ChatTurn(subject=BASE, messages=({"role": "user", "content": text},))


def test_a_request_from_standard_input(settings: Settings) -> None:
    request = GenerateRequest(
        engine=ENGINE, subject=BASE, sampling=Sampling(),
        prompts=tuple(Prompt(source="x:1", messages=({"role": "user", "content": text},)) for text in ("a", "b")),
    )  # fmt: skip
    status, events, _ = run_worker(settings, "generate", "-", text=request.to_json() + "\n")
    assert status == 0
    assert [(event["index"], event["text"]) for event in events] == [(1, "base heard: b"), (0, "base heard: a")]


def test_a_conversation_from_a_file(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join([ChatStart(engine=ENGINE).to_json(), turn("one").to_json(), "", turn("two").to_json()]))
    status, events, _ = run_worker(settings, "chat", str(file))
    assert status == 0 and events[0]["kind"] == "ready"
    assert [event["text"] for event in events if event["kind"] == "answer"] == ["base heard: one", "base heard: two"]


def test_a_conversation_ends_with_its_input(settings: Settings) -> None:
    text = ChatStart(engine=ENGINE).to_json() + "\n" + turn("hello").to_json() + "\n"
    status, events, _ = run_worker(settings, "chat", "-", "--watch", text=text)
    assert status == 0 and events[-1]["text"] == "base heard: hello"


@pytest.mark.parametrize("words", [(), ("train",), ("dance", "x"), ("train", "a", "b")])
def test_wrong_words(settings: Settings, words: tuple[str, ...]) -> None:
    status, events, err = run_worker(settings, *words)
    assert status == 2 and events == [] and err.startswith("usage: ")


@pytest.mark.parametrize("text", ["", "{}", "no json", '{"kind": "turn"}'])
def test_a_request_that_is_none(settings: Settings, text: str) -> None:
    for kind in ("evaluate", "generate", "inspect", "chat"):
        status, events, _ = run_worker(settings, kind, "-", text=text + "\n")
        assert status == 2
        assert [(event["kind"], event["code"]) for event in events] == [("error", "usage-worker-request")]


def test_a_request_file_that_is_missing(settings: Settings, tmp_path: Path) -> None:
    status, events, _ = run_worker(settings, "generate", str(tmp_path / "absent.json"))
    assert status == 2 and events[0]["code"] == "usage-worker-request" and "absent.json" in events[0]["what"]


def test_a_missing_run_folder(settings: Settings, tmp_path: Path) -> None:
    status, events, _ = run_worker(settings, "train", str(tmp_path / "absent"))
    assert status == 1 and events[0]["code"] == "run-missing"


def test_standard_output_carries_events_alone(settings: Settings) -> None:
    """A pipeline that prints, and writes to file descriptor 1, does not disturb them."""
    program = """
import os, sys
from tenon.worker.loop import work
from tenon.worker.fake import FakePipeline

class Noisy(FakePipeline):
    def chat(self, requests, emit, settings, /):
        print("printed")
        os.write(1, b"written\\n")
        super().chat(requests, emit, settings)

sys.exit(work(["chat", "-"], Noisy))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=child_environment(settings), input=ChatStart(engine=ENGINE).to_json() + "\n",
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert [json.loads(line)["kind"] for line in done.stdout.splitlines()] == ["ready"]
    assert "printed" in done.stderr and "written" in done.stderr


def test_an_unexpected_exception_leaves_a_traceback_and_no_event(settings: Settings) -> None:
    program = """
import sys
from tenon.worker.loop import work
sys.exit(work(["train", "x"], lambda: 1 / 0))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=child_environment(settings), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and done.stdout == "" and "ZeroDivisionError" in done.stderr
