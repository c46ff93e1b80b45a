"""Adapters between disk, memory and slots: real slots of a tiny base, read for real, on a clock that stands still."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from tenon.adapters.bank import AdapterBank, Slot
from tenon.adapters.peft_files import AdapterFiles
from tenon.adapters.ready import Arrival, ReadyAdapter
from tenon.errors import AdapterError
from tenon.serve.engine.residency import Bounds, Residency
from tenon.serve.engine.turns import Need
from tenon.serve.jobs import AdapterRef
from tests.serve.test_adapter_memory import Reader
from tests.tiny import CPU, random_slot, slot_shape, tiny_facts

FACTS = tiny_facts()
RANKS = {"a": 2, "b": 16, "c": 3, "d": 1}


@dataclass
class Slow:
    """A way to a device far away: slots come when they are let."""

    in_place: bool = False
    open: bool = False
    started: list[str] = field(default_factory=list)

    def start(self, ready: ReadyAdapter, /) -> Arrival:
        self.started.append(ready.label)
        return _Coming(self, ready)

    def close(self) -> None: ...


@dataclass(frozen=True)
class _Coming:
    way: Slow
    ready: ReadyAdapter

    @property
    def done(self) -> bool:
        return self.way.open

    def slot(self) -> Slot:
        flat_P = self.ready.flat_P.clone()
        return Slot(self.ready.label, self.ready.layout, FACTS, parameters_P=flat_P)


class World:
    """Two slots. Those named `bad…` are refused."""

    def __init__(self, *, memory_bytes: int = 1 << 20, mover: Slow | None = None) -> None:
        self.bank = AdapterBank(FACTS, dtype=torch.float32, device=CPU)
        self.reader, self.now, self.read, self.next_number = Reader(), 100.0, list[str](), 0
        self.residency = Residency(
            self.bank,
            bounds=Bounds(slots=2, memory_bytes=memory_bytes, wait_seconds=10.0),
            read=self.take,
            on_read=lambda: None,
            clock=lambda: self.now,
            reader=self.reader,
            mover=mover,
        )

    def take(self, adapter: AdapterRef) -> AdapterFiles:
        self.read.append(adapter.key)
        if adapter.key.startswith("bad"):
            raise AdapterError("adapter-damaged", "bad", hint="none")
        made = AdapterBank(FACTS, dtype=torch.float32, device=CPU)
        shape = slot_shape(FACTS, rank=RANKS[adapter.key])
        slot = made.slots[random_slot(made, shape, RANKS[adapter.key], trained=False)]
        return AdapterFiles(shape, slot.matrices(), {})

    def arrange(self, *needs: tuple[str, int, float]) -> dict[str, AdapterError]:
        return self.residency.arrange([Need(ref(key), number, since) for key, number, since in needs], self.next_number)

    def bring(self, key: str, number: int = 0) -> int:
        """Have an adapter in a slot and used."""
        for _ in range(3):
            self.arrange((key, number, self.now))
            self.reader.work()
        self.arrange((key, number, self.now))
        assert self.residency.admits(key, number)
        return self.residency.take(key)


def ref(key: str) -> AdapterRef:
    return AdapterRef(key, f"{key}@1")


def test_a_slot_that_comes_or_goes_touches_no_other_and_takes_what_its_own_rank_needs() -> None:
    world = World()
    first = world.bank.slots[world.bring("a")]
    held, groups = first.parameters_P, first.groups
    before = held.clone()
    second = world.bank.slots[world.bring("b")]
    assert second.parameters_P.numel() == 2 * held.numel(), "ranks 2 and 16 are stored as 8 and 16"
    world.residency.release("b")
    third = world.bring("c")
    assert world.bank.slots[third].name == "c@1" and sorted(s.name for s in world.bank.slots.values()) == ["a@1", "c@1"]
    assert first.parameters_P is held and first.groups is groups and torch.equal(held, before)


def test_what_gives_way_stays_in_memory_and_comes_back_without_being_read_or_copied() -> None:
    world = World()
    number = world.bring("a")
    flat_P = world.bank.slots[number].parameters_P
    world.bring("b")
    world.residency.release("a")
    world.bring("c")
    assert world.residency.resident == {"b", "c"} and world.residency.state("a") == "in memory"
    world.residency.release("b")
    again = world.bank.slots[world.bring("a")]
    assert again.parameters_P is flat_P and world.read == ["a", "b", "c"]
    found = world.residency.traffic()
    assert (found.loads, found.evictions, found.reads) == (4, 2, 3)


def test_what_is_to_leave_goes_once_nobody_runs_on_it_or_waits_for_it() -> None:
    world = World()
    world.bring("a")
    world.bring("b")
    world.residency.unload("a")
    world.residency.unload("nobody")
    world.arrange()
    assert world.residency.state("a") == "resident", "a sequence runs on it"
    world.residency.release("a")
    world.arrange(("a", 1, world.now))
    assert world.residency.state("a") == "resident", "a sequence waits for it"
    world.arrange()
    assert world.residency.states() == {"b": "resident"} and world.residency.traffic().memory_bytes == 0
    world.arrange()
    world.bring("a", 2)
    world.residency.release("a")
    world.arrange()
    assert world.residency.state("a") == "resident" and world.read == ["a", "b", "a"], "it was let go once"
    world.bring("c", 3)
    world.residency.unload("a")
    world.arrange()
    assert world.residency.state("a") == "on disk", "from host memory too"


def test_memory_is_bounded_and_what_is_not_kept_is_read_again() -> None:
    world = World(memory_bytes=0)
    world.bring("a")
    world.bring("b")
    world.residency.release("a")
    world.bring("c")
    assert world.residency.state("a") == "on disk" and world.residency.traffic().memory_bytes == 0
    world.residency.release("b")
    world.bring("a")
    assert world.read == ["a", "b", "c", "a"]


def test_where_an_adapter_is_can_be_seen() -> None:
    world = World()
    assert world.residency.state("a") == "on disk"
    world.arrange(("a", 0, 100.0))
    assert world.residency.states() == {"a": "loading"}
    world.bring("a")
    world.bring("b")
    world.arrange(("c", 1, 100.0))
    world.reader.work()
    world.arrange(("c", 1, 100.0))
    assert world.residency.states() == {"a": "resident", "b": "resident", "c": "in memory"}
    for key in ("a", "c", "d"):
        world.residency.count(key)
    found = world.residency.traffic()
    assert (found.from_slot, found.from_memory, found.from_disk) == (1, 1, 1)


def test_a_slot_on_its_way_is_not_used_and_not_given_to_another() -> None:
    way = Slow()
    world = World(mover=way)
    for _ in range(3):
        world.arrange(("a", 0, 100.0), ("b", 1, 100.0), ("c", 2, 100.0))
        world.reader.work()
    assert way.started == ["a@1", "b@1"] and world.bank.slots == {} and world.residency.arriving
    assert not world.residency.admits("a", 0) and world.residency.state("a") == "loading"
    way.open = True
    world.arrange(("a", 0, 100.0), ("b", 1, 100.0), ("c", 2, 100.0))
    assert world.residency.admits("a", 0) and not world.residency.arriving
    for key in "ab":
        world.residency.take(key)
    world.arrange(("c", 2, 100.0))
    assert world.residency.state("c") == "in memory" and len(world.bank.slots) == 2
    world.residency.release("a")
    world.arrange(("c", 2, 100.0))
    assert world.residency.resident == {"b", "c"} and world.residency.state("a") == "in memory", "its copy stays"


def test_who_has_waited_too_long_has_the_slot_longest_in_service_closed() -> None:
    world = World()
    world.bring("a")
    world.bring("b")
    for now, closed in ((105.0, False), (110.0, True)):
        world.now = now
        world.arrange(("c", 5, 100.0), ("a", 6, 104.0))
        world.reader.work()
        assert world.residency.admits("a", 6) is not closed
    assert world.residency.admits("a", 4) and world.residency.admits("b", 6), "what came before, and others, are let in"
    world.now = 112.0
    world.residency.release("a")
    world.arrange(("c", 5, 100.0), ("a", 6, 104.0))
    assert world.residency.resident == {"b", "c"} and world.residency.admits("c", 5)
    assert world.residency.waited_seconds("c", 100.0) == 12.0 and world.residency.waited_seconds("b", 100.0) == 0.0


def test_a_slot_is_opened_again_when_another_place_was_found() -> None:
    world = World()
    world.bring("a")
    world.bring("b")
    world.now = 120.0
    world.arrange(("c", 5, 100.0))
    world.reader.work()
    world.residency.release("b")
    world.arrange(("c", 5, 100.0), ("a", 6, 119.0))
    assert world.residency.resident == {"a", "c"} and world.residency.admits("a", 6)


def test_refused_adapters_take_no_place_and_are_read_anew() -> None:
    world = World()
    for _ in range(2):
        world.arrange(("bad", 0, 100.0))
        world.reader.work()
        assert world.arrange(("bad", 0, 100.0))["bad"].code == "adapter-damaged"
    assert world.residency.states().get("bad") in (None, "loading") and world.read[0] == "bad"


def test_an_adapter_of_another_base_is_refused_by_its_shapes() -> None:
    world = World()
    other = tiny_facts(layers=4)

    def take(adapter: AdapterRef) -> AdapterFiles:
        bank = AdapterBank(other, dtype=torch.float32, device=CPU)
        slot = bank.slots[random_slot(bank, slot_shape(other, rank=2), 1, trained=False)]
        return AdapterFiles(slot.shape, slot.matrices(), {})

    world.take = take
    residency = Residency(
        world.bank,
        bounds=Bounds(2, 1 << 20, 1.0),
        read=take,
        on_read=lambda: None,
        clock=lambda: 0.0,
        reader=world.reader,
    )
    needs = [Need(ref("a"), 0, 0.0)]
    residency.arrange(needs, 1)
    world.reader.work()
    assert residency.arrange(needs, 1)["a"].code == "adapter-target-missing"
    with pytest.raises(KeyError):
        residency.take("a")
