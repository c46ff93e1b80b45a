"""The conversation in the terminal: lines in, streamed answers out, commands that begin with a slash.

This module does not know where lines come from (a person, or --say) nor how answers are made.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol

from rich.console import Console
from rich.text import Text

from tenon.cli.failures import show_error
from tenon.errors import TenonError
from tenon.plan.requests import Message, Sampling, Subject
from tenon.processes import Event

HELP = (
    ("/adapter NAME", "answer with this adapter from now on; `none` is the bare base"),
    ("/adapters", "list what can be switched to"),
    ("/system TEXT", "set the system message instead of the adapter's own; without text, none"),
    ("/reset", "forget the conversation so far"),
    ("/help", "this list"),
    ("/quit", "end (Ctrl-D does the same)"),
)
BARE_BASE = Subject(label="base")


class Talker(Protocol):
    """Answers conversations."""

    def say(self, subject: Subject, messages: list[Message], sampling: Sampling, /) -> Iterator[Event]: ...

    def interrupt(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Names:
    """How names become subjects. find: raises TenonError. known: what can be switched to, with a note each."""

    find: Callable[[str], Subject]
    known: Callable[[], Iterable[tuple[str, str]]]


@dataclass
class Chat:
    """The state of a conversation and what each line does to it.

    system: the system message; empty for none; None for the one that each adapter was trained with.
    """

    talker: Talker
    names: Names
    out: Console
    err: Console
    subject: Subject
    sampling: Sampling
    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    def take(self, line: str) -> bool:
        """Act on one line; False when the conversation is over."""
        line = line.strip()
        if not line:
            return True
        if line.startswith("/"):
            return self._command(line)
        self.messages.append({"role": "user", "content": line})
        answer = self._answer()
        self.messages.append({"role": "assistant", "content": answer})
        return True

    def _answer(self) -> str:
        head = [{"role": "system", "content": self.system}] if self.system else []
        subject = self.subject if self.system is None else self.subject.model_copy(update={"system": None})
        text = ""
        self.out.print(Text(f"{self.subject.label}: ", "bold green"), end="")
        with _interrupting(self.talker):
            for event in self.talker.say(subject, [*head, *self.messages], self.sampling):
                if event["kind"] == "token":
                    write_token(str(event["text"]))
                elif event["kind"] == "answer":
                    text = str(event["text"])
                    self._end_of_answer(event)
        return text

    def _end_of_answer(self, event: Event) -> None:
        sys.stdout.write("\n")
        sys.stdout.flush()
        if event["finish"] == "length":
            self.err.print(Text(f"  (cut at {event['tokens']:,} tokens: --max-new-tokens)", "dim"))
        elif event["finish"] == "interrupted":
            self.err.print(Text("  (interrupted)", "dim"))

    def _command(self, line: str) -> bool:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in ("/quit", "/exit"):
            return False
        if name == "/adapter" and rest:
            self._switch(rest)
        elif name in ("/adapters", "/adapter"):
            for known, note in [("none", "the bare base"), *self.names.known()]:
                mark = "*" if known == self.subject.label or (known == "none" and not self.subject.folder) else " "
                self.err.print(Text.assemble(f" {mark} ", (known, "bold"), (f"  {note}", "dim")))
        elif name == "/system":
            self.system = rest
            self.err.print(Text(f"  system message: {rest or 'none'}", "dim"))
        elif name == "/reset":
            self.messages.clear()
            self.err.print(Text("  the conversation begins anew", "dim"))
        elif name == "/help":
            for command, meaning in HELP:
                self.err.print(Text.assemble((f"  {command:<15}", "bold"), meaning))
        else:
            self.err.print(Text(f"  there is no command {name}; /help lists them", "yellow"))
        return True

    def _switch(self, name: str) -> None:
        try:
            self.subject = BARE_BASE if name in ("none", "base") else self.names.find(name)
        except TenonError as error:
            show_error(self.err, error)
            return
        self.err.print(Text(f"  {self.subject.label} answers from now on", "dim"))


def write_token(text: str) -> None:
    """Text as it comes. What a model says must not steer the terminal: control characters become visible."""
    safe = "".join(letter if letter.isprintable() or letter in "\n\t" else f"\\x{ord(letter):02x}" for letter in text)
    sys.stdout.write(safe)
    sys.stdout.flush()


@contextmanager
def _interrupting(talker: Talker) -> Iterator[None]:
    """Ctrl-C ends the answer, not the conversation."""

    def handler(_number: int, _frame: FrameType | None) -> None:
        talker.interrupt()

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
