"""`tenon chat` and `tenon generate` with the fake worker."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from tenon.cli.chat_loop import Chat, Names, write_token
from tenon.plan.requests import Message, Sampling, Subject
from tenon.processes import Event
from tenon.registry.entry import EntryDraft
from tenon.registry.store import Registry
from tenon.service.bases import describe_base
from tenon.settings import Settings, child_environment

from ..registry.samples import write_adapter
from .conftest import Command


@pytest.fixture
def adapter(tmp_path: Path, fake_settings: Settings) -> str:
    """A registered adapter of the embedded base."""
    base = describe_base("smollm2-135m", fake_settings)
    draft = EntryDraft(base_spec="smollm2-135m", base_hash=base.base_hash)
    return Registry(fake_settings.registry).register("helper", write_adapter(tmp_path / "helper"), draft).label


@pytest.fixture
def other_adapter(tmp_path: Path, fake_settings: Settings) -> str:
    """A registered adapter of another base."""
    draft = EntryDraft(base_spec="smollm2-135m", base_hash="0" * 64)
    return Registry(fake_settings.registry).register("stranger", write_adapter(tmp_path / "stranger"), draft).label


def test_lines_are_said_and_answered(tenon: Command) -> None:
    done = tenon("chat", "--say", "hello there", "--say", "and now?")
    assert done.status == 0
    assert done.out.splitlines() == [
        "you: hello there", "base: base heard: hello there", "you: and now?", "base: base heard: and now?",
    ]  # fmt: skip


def test_adapters_are_switched_without_loading_the_base_again(tenon: Command, adapter: str) -> None:
    done = tenon(
        "chat", "--say", "one", "--say", "/adapter helper", "--say", "two", "--say", "/adapter none", "--say", "x"
    )
    answers = [line for line in done.out.splitlines() if "heard" in line]
    assert answers == ["base: base heard: one", f"{adapter}: {adapter} heard: two", "base: base heard: x"]
    assert done.err.count("loading the base") <= 1


def test_a_chat_begins_with_an_adapter(tenon: Command, adapter: str) -> None:
    done = tenon("chat", "helper", "--say", "/adapters", "--say", "hi")
    assert f"{adapter}: {adapter} heard: hi" in done.out
    assert f"* {adapter}" in done.err and "none" in done.err


def test_p18_an_adapter_of_another_base_is_refused(tenon: Command, other_adapter: str) -> None:
    done = tenon("chat", "stranger", "--say", "hi")
    assert done.status == 1 and "error[adapter-other-base]" in done.err
    done = tenon("chat", "--say", "/adapter stranger", "--say", "still there?")
    assert done.status == 0 and "error[adapter-other-base]" in done.err
    assert "base: base heard: still there?" in done.out


def test_an_unknown_adapter_names_the_nearest(tenon: Command, adapter: str) -> None:
    done = tenon("chat", "helpr", "--say", "hi")
    assert done.status == 1 and "error[adapter-unknown]" in done.err and "did you mean helper" in done.err


def test_a_chat_in_a_terminal(workplace: Path, fake_settings: Settings) -> None:
    """Typed lines, Ctrl-C in the middle of an answer, Ctrl-D at the end."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "tenon.cli.main", "chat"],
        env={**child_environment(fake_settings), "TERM": "dumb", "NO_COLOR": "1"},
        cwd=workplace, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    try:
        read_until(ours, "you: ")
        os.write(ours, b"hello\n")
        read_until(ours, "base heard: hello")
        os.write(ours, (" ".join(["word"] * 300) + "\n").encode())
        read_until(ours, "heard: word word")
        process.send_signal(signal.SIGINT)
        read_until(ours, "(interrupted)")
        os.write(ours, b"/reset\n")
        read_until(ours, "anew")
        os.write(ours, b"\x04")
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        os.close(ours)


def read_until(terminal: int, words: str) -> str:
    seen, deadline = "", time.monotonic() + 20
    while words not in seen.replace("\r\n", "\n"):
        assert time.monotonic() < deadline, f"{words!r} never came: {seen!r}"
        if select.select([terminal], [], [], 0.1)[0]:
            seen += os.read(terminal, 4096).decode(errors="replace")
    return seen


class Listener:
    """Answers with the number of messages, and remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[list[Message]] = []

    def say(self, subject: Subject, messages: list[Message], sampling: Sampling, /) -> Iterator[Event]:
        self.told.append(list(messages))
        yield {"kind": "token", "text": str(len(messages))}
        yield {"kind": "answer", "text": str(len(messages)), "tokens": 1, "finish": "stop", "seconds": 0.1}

    def interrupt(self) -> None:
        raise AssertionError("nobody interrupts")


def chat_with(listener: Listener) -> Chat:
    def find(name: str) -> Subject:
        return Subject(label=name, folder=f"/{name}")

    console = Console(quiet=True)
    return Chat(
        listener, Names(find, lambda: []), console, console, Subject(label="base"), Sampling(), system="be brief"
    )


def test_the_conversation_is_remembered_until_it_is_reset() -> None:
    listener = Listener()
    chat = chat_with(listener)
    for line in ("one", "two", "/reset", "three", "/system", "four"):
        assert chat.take(line)
    roles = [[message["role"] for message in told] for told in listener.told]
    assert roles == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
        ["system", "user"],
        ["user", "assistant", "user"],
    ]
    assert listener.told[1][2]["content"] == "2"


@pytest.mark.parametrize("line", ["/quit", "/exit"])
def test_a_chat_can_be_left(line: str) -> None:
    assert not chat_with(Listener()).take(line)


@pytest.mark.parametrize("line", ["", "   ", "/help", "/adapters", "/nonsense", "/adapter x"])
def test_commands_say_nothing_to_the_base(line: str) -> None:
    listener = Listener()
    assert chat_with(listener).take(line)
    assert listener.told == []


def test_what_a_model_says_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    write_token("a\x1b[2Jb\n\tc\x07é你")
    assert capsys.readouterr().out == "a\\x1b[2Jb\n\tc\\x07é你"


def test_generate_answers_in_order(tenon: Command, workplace: Path, adapter: str) -> None:
    rows = [{"prompt": "one"}, {"messages": [{"role": "user", "content": "two"}]}]
    (workplace / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = tenon("generate", "helper", "--input", "in.jsonl", "--output", "out/answers.jsonl", "--system", "be brief")
    answers = [json.loads(line) for line in (workplace / "out/answers.jsonl").read_text().splitlines()]
    assert done.status == 0
    assert [answer["answer"] for answer in answers] == [f"{adapter} heard: one", f"{adapter} heard: two"]
    assert answers[0]["messages"][0] == {"role": "system", "content": "be brief"}
    assert answers[1]["source"] == "in.jsonl:2"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "data-file-empty"),
        ('{"prompt": "a"}\n{broken\n', "data-prompt-line"),
        ('{"text": "a"}\n', "data-prompt-line"),
        ('{"messages": []}\n', "data-prompt-line"),
        ('{"messages": [{"content": "a"}]}\n', "data-prompt-line"),
    ],
)
def test_prompts_that_are_none_are_named(tenon: Command, workplace: Path, text: str, code: str) -> None:
    (workplace / "in.jsonl").write_text(text)
    done = tenon("generate", "--input", "in.jsonl", "--output", "out.jsonl")
    assert done.status == 1 and f"error[{code}]" in done.err
    assert not (workplace / "out.jsonl").exists()


def test_a_missing_prompt_file(tenon: Command) -> None:
    assert "error[data-file-missing]" in tenon("generate", "--input", "absent.txt", "--output", "out.jsonl").err


def test_prompts_in_another_encoding(tenon: Command, workplace: Path) -> None:
    (workplace / "in.txt").write_bytes("größer".encode("latin-1"))
    assert "error[data-encoding]" in tenon("generate", "--input", "in.txt", "--output", "out.jsonl").err
