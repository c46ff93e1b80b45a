"""Which adapters are in the bank: bounded, the longest idle one gives way, files are read ahead but not hoarded."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from tenon.adapters.bank import AdapterBank, SlotShape
from tenon.adapters.peft_files import AdapterFiles
from tenon.errors import AdapterError
from tenon.serve.jobs import AdapterRef
from tenon.serve.residency import Residency
from tests.serve.house import wait_until
from tests.tiny import CPU, random_slot, slot_shape, tiny_facts

FACTS = tiny_facts()


class Shelf:
    """Adapters made when they are read; those named `bad…` are refused, reading waits while it is shut."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.open = threading.Event()
        self.open.set()
        self.told = 0

    def take(self, adapter: AdapterRef) -> AdapterFiles:
        self.open.wait(10)
        self.read.append(adapter.key)
        if adapter.key.startswith("bad"):
            raise AdapterError("adapter-damaged", "bad", hint="none")
        bank = AdapterBank(FACTS, dtype=torch.float32, device=CPU)
        shape: SlotShape = slot_shape(FACTS, rank=2)
        slot = bank.slots[random_slot(bank, shape, 1, trained=False)]
        return AdapterFiles(shape, slot.matrices(), {})

    def tell(self) -> None:
        self.told += 1


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def bank() -> AdapterBank:
    return AdapterBank(FACTS, dtype=torch.float32, device=CPU)


@pytest.fixture
def residency(shelf: Shelf, bank: AdapterBank) -> Iterator[Residency]:
    made = Residency(bank, slots=2, read=shelf.take, on_read=shelf.tell)
    yield made
    shelf.open.set()
    made.close()


def ref(key: str) -> AdapterRef:
    return AdapterRef(key, f"{key}@1")


def acquire(residency: Residency, key: str) -> int:
    """The slot, once the files have been read."""
    found: list[int] = []

    def there() -> bool:
        slot = residency.acquire(ref(key))
        found.extend([] if slot is None else [slot])
        return slot is not None

    wait_until(there)
    return found[0]


def test_the_longest_idle_adapter_gives_way(residency: Residency, bank: AdapterBank, shelf: Shelf) -> None:
    for key in ("b", "a", "b"):
        acquire(residency, key)
        residency.release(ref(key))
    acquire(residency, "c")
    assert residency.resident == {"b", "c"} and residency.loads == 3
    assert sorted(slot.name for slot in bank.slots.values()) == ["b@1", "c@1"]
    assert acquire(residency, "c") == acquire(residency, "c")
    assert shelf.read == ["b", "a", "c"]


def test_who_is_used_stays_and_the_next_one_waits(residency: Residency, shelf: Shelf) -> None:
    acquire(residency, "a")
    acquire(residency, "b")
    assert residency.acquire(ref("c")) is None
    wait_until(lambda: shelf.told == 3)
    assert residency.acquire(ref("c")) is None and residency.resident == {"a", "b"}
    residency.release(ref("a"))
    assert residency.acquire(ref("c")) is not None
    assert residency.resident == {"b", "c"} and shelf.read == ["a", "b", "c"]


def test_only_a_few_are_read_ahead_and_dropped_when_nobody_waits(residency: Residency, shelf: Shelf) -> None:
    shelf.open.clear()
    for key in "abcdef":
        assert residency.acquire(ref(key)) is None
    residency.forget_others({"e"})
    shelf.open.set()
    acquire(residency, "e")
    assert residency.resident == {"e"} and len(shelf.read) <= 2


def test_refused_files_are_read_anew_the_next_time(residency: Residency, shelf: Shelf) -> None:
    for _ in range(2):
        assert residency.acquire(ref("bad")) is None
        wait_until(lambda: shelf.told == len(shelf.read))
        with pytest.raises(AdapterError):
            wait_until(lambda: residency.acquire(ref("bad")) is not None)
    assert shelf.read == ["bad", "bad"] and residency.resident == frozenset()
