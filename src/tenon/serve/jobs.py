"""What the engine's thread is asked and what it tells: token ids and adapters, no text and no HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

from tenon.errors import TenonError
from tenon.infer.requests import Completion, Request, Token


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One registered version of an adapter. key: hash of its files, equal for equal adapters. label: `name@3`."""

    key: str
    label: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The sequence is complete, or was cancelled."""

    completion: Completion


@dataclass(frozen=True, slots=True)
class Failed:
    """The sequence cannot be made, or not to its end."""

    error: TenonError


Event: TypeAlias = Token | Ended | Failed


class Mailbox(Protocol):
    """Where the events of one job go: tokens as they come, then one Ended or Failed."""

    def put(self, event: Event) -> None:
        """Called where `Deliver` says, one event after the other."""
        ...


class Deliver(Protocol):
    """Hands events over to whoever waits for them. Called by the engine's thread, once a pass; must not block."""

    def __call__(self, letters: list[tuple[Mailbox, Event]], /) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One sequence to make. request: its slot is filled in when the adapter has one. adapter: None is the bare base."""

    request: Request
    adapter: AdapterRef | None
    mailbox: Mailbox
