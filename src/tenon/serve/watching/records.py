"""What is known of one request: filled in on its way through the server, told to those who watch when it has ended.

    middleware      makes it, notes the status, tells the observers
    access          whose request it was
    gate            who answered, how many tokens, and when
    error_replies   what was wrong

It travels in the context of its task, so that nobody on the way has to hand it on. It holds no prompt and no key; who
is to see prompts asks for them (`keep_prompts`). This module does not know who watches.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

from tenon.serve.jobs import Waits

# What nginx calls an answer that nobody waits for; it is only ever seen by those who watch.
CLIENT_GONE = 499

Outcome: TypeAlias = Literal["ok", "refused", "cancelled", "error"]
OUTCOMES: tuple[Outcome, ...] = ("ok", "refused", "cancelled", "error")


@dataclass(slots=True)
class Record:
    """One request. Times are seconds of `time.monotonic`, but for began_unix_seconds; None: it did not come so far.

    id: its `X-Request-Id`. route: as the application knows it, `other` for what it does not. parent: the client's W3C
    `traceparent`, unchecked. tenant, key: whose it is; None where no key is asked for. model: who answered, `name@3`.
    submitted: its sequences were handed to the engine. first, last: its first token came, and all had ended. waits:
    the longest of its sequences. cut_off: it was ended before its sequences had.
    """

    id: str = ""
    method: str = ""
    route: str = "other"
    parent: str | None = None
    began: float = field(default_factory=time.monotonic)
    began_unix_seconds: float = field(default_factory=time.time)
    ended: float | None = None
    status: int = 500
    error: str | None = None
    stream: bool = False
    tenant: str | None = None
    key: str | None = None
    model: str | None = None
    sequences: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    submitted: float | None = None
    first: float | None = None
    last: float | None = None
    waits: Waits | None = None
    finish: tuple[str, ...] = ()
    cut_off: bool = False
    keep_prompts: bool = False
    prompts: tuple[Sequence[int], ...] = ()

    @property
    def outcome(self) -> Outcome:
        """How it ended."""
        if self.status == CLIENT_GONE:
            return "cancelled"
        if self.error is not None or self.status >= 400:
            return "refused" if 400 <= self.status < 500 else "error"
        return "cancelled" if self.cut_off else "ok"

    @property
    def first_token_seconds(self) -> float | None:
        """From the request to its first token."""
        return None if self.first is None else self.first - self.began

    @property
    def token_seconds(self) -> float | None:
        """The mean time of a token after the first, in one sequence."""
        more = self.completion_tokens - self.sequences
        if self.first is None or self.last is None or more <= 0:
            return None
        return (self.last - self.first) * self.sequences / more


class Observer(Protocol):
    """Who is told of requests. Called in the thread of the event loop: must not block."""

    def ended(self, record: Record, /) -> None:
        """A request has been answered, or its client has gone."""
        ...


_CURRENT: ContextVar[Record | None] = ContextVar("tenon_request", default=None)


def begin(record: Record) -> None:
    """What follows in this task belongs to the request."""
    _CURRENT.set(record)


def current() -> Record:
    """The request that this is done for; one that nobody sees where there is none."""
    return _CURRENT.get() or Record()


def current_for_answers() -> Record:
    """The same for its sequences: those that are asked first are its own, later ones (a shadow's) nobody's."""
    record = current()
    return record if record.submitted is None else Record()
