"""What the engine's thread is asked and what it tells: token ids and adapters, no text and no HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, Protocol, TypeAlias

from tenon.errors import TenonError
from tenon.infer.requests import Completion, Request, Token


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One registered version of an adapter. key: hash of its files, equal for equal adapters. label: `name@3`.
    size_bytes: of its files, 0 where that is not known.
    """

    key: str
    label: str
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Waits:
    """What a sequence waited for: its adapter, then a place in the batch."""

    adapter_seconds: float
    place_seconds: float


@dataclass(frozen=True, slots=True)
class Ended:
    """The sequence is complete, or was cancelled. waits: None where nobody measured."""

    completion: Completion
    waits: Waits | None = None


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


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody waits for a job any more: a word of the queue to who makes sequences."""

    job: Job


@dataclass(frozen=True, slots=True)
class Unload:
    """An adapter is to go once nobody needs it: another such word."""

    key: str


@dataclass(frozen=True, slots=True)
class Limits:
    """rows: sequences at a time. context_tokens: longest sequence, prompt and answer together. cache_bytes: keys and
    values of all sequences, and of beginnings that are remembered. pass_tokens: most tokens of one pass. slots:
    adapters in the bank at a time. adapter_bytes: host memory for adapters beside those. adapter_wait_seconds: after
    which an adapter that waits for a slot has one closed for it (see `serve.engine.turns`).
    """

    rows: int
    context_tokens: int
    cache_bytes: int
    pass_tokens: int
    slots: int
    adapter_bytes: int = 2 << 30
    adapter_wait_seconds: float = 5.0


# Where an adapter is nearest to hand: in a slot, on its way from host memory into one, read and ready in host memory,
# being read, or on disk alone.
AdapterState: TypeAlias = Literal["resident", "loading", "in memory", "on disk"]


@dataclass(frozen=True, slots=True)
class AdapterTraffic:
    """What adapters did so far. from_slot, from_memory, from_disk: sequences whose adapter was there when they came.

    reads: adapters read from disk, in read_seconds together. checks: of what they say against what they said when they
    were trained, in check_seconds together; check_refusals: those that failed. loads: adapters put into a slot;
    evictions: taken out of one for another; dropped: from host memory. memory_bytes: what host memory holds now.
    waited, wait_seconds, most_wait_seconds: sequences that waited for a slot, how long together, and the longest.
    """

    from_slot: int = 0
    from_memory: int = 0
    from_disk: int = 0
    reads: int = 0
    read_seconds: float = 0.0
    checks: int = 0
    check_seconds: float = 0.0
    check_refusals: int = 0
    loads: int = 0
    evictions: int = 0
    dropped: int = 0
    memory_bytes: int = 0
    waited: int = 0
    wait_seconds: float = 0.0
    most_wait_seconds: float = 0.0


def sum_traffic(parts: Sequence[AdapterTraffic]) -> AdapterTraffic:
    """What the adapters of several engines did together."""
    names = [each.name for each in fields(AdapterTraffic) if each.name != "most_wait_seconds"]
    together = {name: sum(getattr(part, name) for part in parts) for name in names}
    return AdapterTraffic(**together, most_wait_seconds=max((part.most_wait_seconds for part in parts), default=0.0))


def nearest(parts: Sequence[Mapping[str, AdapterState]]) -> dict[str, AdapterState]:
    """Where adapters are nearest to hand in any of several engines."""
    order: tuple[AdapterState, ...] = ("on disk", "in memory", "loading", "resident")
    found: dict[str, AdapterState] = {}
    for part in parts:
        for key, state in part.items():
            before = found.get(key, order[0])
            found[key] = state if order.index(state) > order.index(before) else before
    return found


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is: sequences that have a place, that wait for one, and that wait for their adapter.

    cache_used: share of the cache that sequences hold. prefix_hit_tokens: tokens of prompts that were not computed
    again, since the start; preemptions: how often a sequence gave up its place when the cache was full. able: whether
    anything could be begun now; where engines are processes of their own, all may be starting. adapters: what adapters
    did; states: where those are that are not on disk alone, by key.
    """

    running: int = 0
    waiting: int = 0
    parked: int = 0
    cache_used: float = 0.0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    able: bool = True
    adapters: AdapterTraffic = AdapterTraffic()
    states: Mapping[str, AdapterState] = field(default_factory=dict)


class Engines(Protocol):
    """Whoever makes sequences: one engine in this process, several in processes of their own, or a foreign one.

    All but `run` may be called from any thread.
    """

    limits: Limits
    load: Load

    @property
    def resident(self) -> frozenset[str]:
        """Keys of the adapters that are in memory."""
        ...

    @property
    def loads(self) -> int:
        """How often an adapter was put into memory."""
        ...

    def submit(self, job: Job) -> None:
        """Have a sequence made; its mailbox gets the events."""
        ...

    def cancel(self, job: Job) -> None:
        """End a job as soon as can be. Harmless when it has ended."""
        ...

    def unload(self, key: str) -> None:
        """Let an adapter go, from its slot and from memory, once no sequence runs on it or waits for it. Whoever asks
        for it later has it read again. Harmless when it is not there.
        """
        ...

    def stop(self) -> None:
        """Let `run` return soon; what runs then is failed."""
        ...

    def run(self) -> None:
        """Work until `stop`. Every job is told of an end in any case."""
        ...
