"""Adapters between disk, host memory and the slots of the bank, so that no running sequence waits for any of it.

    disk  --reader thread-->  host memory, ready (`adapter_memory`)  --arrival-->  slot  --probes-->  open to requests

`turns` decides who gets a slot; here it is done. What the thread that owns the bank does itself is to take a finished
slot in or out: no matrix is copied by it, and no other slot is touched. Everything belongs to that thread. An adapter
that has been read is asked its probes once, in its first slot, by whoever calls `to_check` and `judge`.
This module knows no requests, only who waits for an adapter and who uses one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Protocol

from tenon.adapters.bank import AdapterBank
from tenon.adapters.peft_files import AdapterFiles
from tenon.adapters.ready import Arrival, BankKind, Mover, ReadyAdapter, make_mover, make_ready
from tenon.errors import AdapterError
from tenon.registry.probes import Probes
from tenon.serve.engine.adapter_memory import AdapterMemory
from tenon.serve.engine.turns import Decision, Need, Place, decide
from tenon.serve.jobs import AdapterRef, AdapterState, AdapterTraffic


class ReadFiles(Protocol):
    """Reads and checks the files of an adapter; called by another thread. Raises AdapterError."""

    def __call__(self, adapter: AdapterRef, /) -> AdapterFiles: ...


class ReadProbes(Protocol):
    """What an adapter said when it was trained, if that is known; called by another thread. Raises AdapterError."""

    def __call__(self, adapter: AdapterRef, /) -> Probes | None: ...


@dataclass(frozen=True, slots=True)
class Bounds:
    """slots: most adapters in the bank. memory_bytes: of adapters beside them. wait_seconds: see `turns`."""

    slots: int
    memory_bytes: int
    wait_seconds: float


@dataclass(frozen=True, slots=True)
class ToCheck:
    """An adapter in its slot that is to be asked its probes."""

    adapter: AdapterRef
    slot: int
    probes: Probes


@dataclass(slots=True)
class _Kept:
    """An adapter in host memory. probes: what it is still to be asked."""

    adapter: AdapterRef
    ready: ReadyAdapter
    probes: Probes | None

    @property
    def size_bytes(self) -> int:
        """What it takes, without the little that probes take."""
        return self.ready.size_bytes


@dataclass(frozen=True, slots=True)
class _Held:
    """An adapter with a place. number: its slot, None while it is on its way. kept: its copy in host memory, where
    that is the slot itself. unchecked: the same while it has still to be asked its probes; since: when that began.
    """

    place: Place
    arrival: Arrival | None
    number: int | None = None
    kept: _Kept | None = None
    unchecked: _Kept | None = None
    since: float = 0.0

    @property
    def usable(self) -> bool:
        """Whether it is in its slot and has said what it is to say."""
        return self.number is not None and self.unchecked is None


@dataclass(slots=True)
class _Counts:
    loads: int = 0
    evictions: int = 0
    checks: int = 0
    check_seconds: float = 0.0
    check_refusals: int = 0
    found: dict[AdapterState, int] = field(default_factory=dict)


class Residency:
    """The adapters of one bank, by their key."""

    def __init__(
        self,
        bank: AdapterBank,
        *,
        bounds: Bounds,
        read: ReadFiles,
        read_probes: ReadProbes | None = None,
        on_read: Callable[[], None],
        clock: Callable[[], float],
        reader: Executor | None = None,
        mover: Mover | None = None,
    ) -> None:
        """read_probes: without it nothing is asked. on_read: called by another thread, when something has been read or
        refused: `arrange` again then. reader: of one thread. mover: by default the one that the bank's device wants.
        """
        self._bank, self._bounds, self._clock = bank, bounds, clock
        self._kind = BankKind(bank.facts, bank.dtype, bank.device)
        self._mover = mover or make_mover(self._kind)
        self._read, self._read_probes = read, read_probes
        self._memory: AdapterMemory[_Kept] = AdapterMemory(
            self._make_kept,
            most_bytes=bounds.memory_bytes,
            reader=reader or ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapters"),
            on_read=on_read,
            clock=clock,
        )
        self._held: dict[str, _Held] = {}
        self._to_check: list[ToCheck] = []
        self._leaving: set[str] = set()  # they go once nobody needs them
        self._refused: dict[str, AdapterError] = {}  # by their probes, since `arrange` said so last
        self._turn = itertools.count()
        self._next_number = 0
        self._counts = _Counts()
        self.resident: frozenset[str] = frozenset()

    @property
    def arriving(self) -> bool:
        """Whether a slot is on its way: `arrange` again soon."""
        return any(held.number is None for held in self._held.values())

    def arrange(self, needs: Sequence[Need], next_number: int) -> dict[str, AdapterError]:
        """Bring what is waited for nearer. needs: in the order of arrival. next_number: above those of all that wait.
        Returns why adapters were refused, by key; they are read anew when they are needed again.
        """
        self._next_number = next_number
        self._settle()
        refused, self._refused = self._refused, {}
        missing = [need for need in needs if need.adapter.key not in self._held and need.adapter.key not in refused]
        refused |= self._memory.want([need.adapter for need in missing])
        needs = [need for need in needs if need.adapter.key not in refused]
        self._let_go({need.adapter.key for need in needs})
        decision = decide(
            needs,
            {key: held.place for key, held in self._held.items()},
            slots=self._bounds.slots,
            at_hand=self._memory.kept,
            now=self._clock(),
            wait_seconds=self._bounds.wait_seconds,
        )
        self._carry_out(decision)
        return refused

    def to_check(self) -> list[ToCheck]:
        """Adapters that came into a slot and are to be asked their probes: each is told once, and waits for `judge`."""
        found, self._to_check = self._to_check, []
        return found

    def judge(self, key: str, error: AdapterError | None) -> None:
        """An adapter has been asked its probes: let requests use it, or throw it out. `arrange` then tells why."""
        held = self._held[key]
        assert held.unchecked is not None
        self._counts.checks += 1
        self._counts.check_seconds += self._clock() - held.since
        if error is None:
            held.unchecked.probes = None
            self._held[key] = replace(held, unchecked=None)
            self._open(held.place)
        else:
            self._counts.check_refusals += 1
            self._refused[key] = error
            self._evict(key)
            self._memory.drop(key)
        self._tell_resident()

    def unload(self, key: str) -> None:
        """Let an adapter go, by `arrange`, once nobody needs it."""
        self._leaving.add(key)

    def admits(self, key: str, number: int) -> bool:
        """Whether a sequence may be let in now: its adapter has a slot that is not closed to it."""
        held = self._held.get(key)
        return held is not None and held.usable and held.place.admits(number)

    def take(self, key: str) -> int:
        """The slot of an adapter that `admits`; kept until `release`."""
        held = self._held[key]
        assert held.number is not None
        held.place.users += 1
        held.place.used = next(self._turn)
        return held.number

    def waited_seconds(self, key: str, since: float) -> float:
        """How long a sequence that came at `since` was not admitted."""
        return max(self._held[key].place.open_since - since, 0.0)

    def release(self, key: str) -> None:
        """One sequence less needs the slot."""
        self._held[key].place.users -= 1

    def state(self, key: str) -> AdapterState:
        """Where an adapter is nearest to hand."""
        held = self._held.get(key)
        if held is not None:
            return "resident" if held.usable else "loading"
        if key in self._memory.kept:
            return "in memory"
        return "loading" if key in self._memory.reading else "on disk"

    def states(self) -> dict[str, AdapterState]:
        """Where those are that are not on disk alone."""
        keys = (*self._memory.reading, *self._memory.kept, *self._held)
        return {key: self.state(key) for key in keys}

    def count(self, key: str) -> None:
        """A sequence came for an adapter: note where that is."""
        found = self._counts.found
        found[self.state(key)] = found.get(self.state(key), 0) + 1

    def traffic(self) -> AdapterTraffic:
        """What adapters did so far, without the waiting of sequences."""
        found, memory = self._counts.found, self._memory
        return AdapterTraffic(
            from_slot=found.get("resident", 0),
            from_memory=found.get("in memory", 0),
            from_disk=found.get("on disk", 0) + found.get("loading", 0),
            reads=memory.reads,
            read_seconds=memory.read_seconds,
            loads=self._counts.loads,
            evictions=self._counts.evictions,
            checks=self._counts.checks,
            check_seconds=self._counts.check_seconds,
            check_refusals=self._counts.check_refusals,
            dropped=memory.dropped,
            memory_bytes=memory.size_bytes,
        )

    def close(self) -> None:
        """Read nothing more."""
        self._memory.close()
        self._mover.close()

    def _let_go(self, needed: set[str]) -> None:
        """Take out those that are to leave and that nobody needs any more."""
        for key in self._leaving - needed - self._memory.reading:
            held = self._held.get(key)
            if held is not None and (held.place.users or not held.usable):
                continue
            if held is not None:
                self._evict(key)
            self._memory.drop(key)
            self._leaving.discard(key)
        self._tell_resident()

    def _carry_out(self, decision: Decision) -> None:
        for key, out in decision.gives:
            if out is not None:
                self._evict(out)
            self._give(key)
        for key, held in self._held.items():
            closed_to = decision.closed.get(key)
            if held.place.closed_to is not None and closed_to != held.place.closed_to:
                held.place.open_since = self._clock()
            held.place.closed_to = closed_to
        if decision.gives:
            self._settle()

    def _give(self, key: str) -> None:
        """Begin to bring an adapter that is in memory into a slot."""
        in_place = self._mover.in_place
        kept = self._memory.take(key) if in_place else self._memory.find(key)
        assert kept is not None
        self._memory.touch(key)
        turn = next(self._turn)
        place = Place(users=0, used=turn, since=turn, fixed=True)
        self._held[key] = _Held(
            place,
            self._mover.start(kept.ready),
            kept=kept if in_place else None,
            unchecked=None if kept.probes is None else kept,
        )

    def _settle(self) -> None:
        """Take in the slots that have arrived."""
        for key, held in self._held.items():
            if held.arrival is not None and held.arrival.done:
                number = self._bank.attach(held.arrival.slot())
                self._held[key] = replace(held, arrival=None, number=number, since=self._clock())
                self._counts.loads += 1
                if held.unchecked is None:
                    self._open(held.place)
                else:
                    assert held.unchecked.probes is not None
                    self._to_check.append(ToCheck(held.unchecked.adapter, number, held.unchecked.probes))
        self._tell_resident()

    def _open(self, place: Place) -> None:
        """Let those in who wait."""
        place.fixed, place.open_since, place.promised_to = False, self._clock(), self._next_number

    def _tell_resident(self) -> None:
        self.resident = frozenset(key for key, held in self._held.items() if held.usable)

    def _make_kept(self, adapter: AdapterRef) -> _Kept:
        """Read an adapter; by the reader's thread."""
        ready = make_ready(adapter.label, self._read(adapter), self._kind)
        probes = None if self._read_probes is None else self._read_probes(adapter)
        return _Kept(adapter, ready, probes if probes is not None and probes.probes else None)

    def _evict(self, key: str) -> None:
        """Take an adapter out of the bank; what is in host memory stays there as long as there is room."""
        held = self._held.pop(key)
        assert held.number is not None and held.place.users == 0
        self._bank.remove(held.number)
        self._counts.evictions += 1
        if held.kept is not None:
            self._memory.keep(key, held.kept)
