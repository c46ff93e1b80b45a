"""Host memory of adapters: read ahead in the order of need, within bytes; what nobody waits for goes first."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import pytest

from tenon.errors import AdapterError
from tenon.serve.engine.adapter_memory import AdapterMemory
from tenon.serve.jobs import AdapterRef


@dataclass(frozen=True)
class Thing:
    key: str
    size_bytes: int


class Reader(Executor):
    """A reader that works when it is told to, one thing at a time."""

    def __init__(self) -> None:
        self.asked: list[tuple[Future[Any], Callable[[], Any]]] = []
        self.closed = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.asked.append((future, lambda: fn(*args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.closed = True

    def work(self) -> None:
        """Read the next thing that is still wanted."""
        while self.asked:
            future, read = self.asked.pop(0)
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(read())
            except AdapterError as error:
                future.set_exception(error)
            return


class World:
    """A memory of 100 bytes over things of 40; those named `bad…` are refused."""

    def __init__(self, most_bytes: int = 100) -> None:
        self.reader, self.read, self.told, self.now = Reader(), list[str](), 0, 0.0
        self.memory: AdapterMemory[Thing] = AdapterMemory(
            self.take, most_bytes=most_bytes, reader=self.reader, on_read=self.tell, clock=lambda: self.now
        )

    def take(self, adapter: AdapterRef) -> Thing:
        self.read.append(adapter.key)
        self.now += 2.0
        if adapter.key.startswith("bad"):
            raise AdapterError("adapter-damaged", "bad", hint="none")
        return Thing(adapter.key, 40)

    def tell(self) -> None:
        self.told += 1

    def want(self, *keys: str) -> dict[str, AdapterError]:
        return self.memory.want([AdapterRef(key, key, 40) for key in keys])


def test_what_waits_is_read_in_the_order_of_need_and_no_more_than_fits() -> None:
    world = World()
    for _ in range(6):
        assert world.want("a", "b", "c", "d") == {}
        world.reader.work()
    assert world.read == ["a", "b"] and world.memory.kept == {"a", "b"} and world.told == 2
    world.memory.take("a")
    world.want("b", "c", "d")
    world.reader.work()
    world.want("b", "c", "d")
    assert world.read == ["a", "b", "c"] and world.memory.size_bytes == 80
    assert (world.memory.reads, world.memory.read_seconds) == (3, 6.0)


def test_the_first_is_read_however_large_it_is() -> None:
    world = World(most_bytes=10)
    world.want("a", "b")
    world.reader.work()
    world.want("a", "b")
    assert world.read == ["a"] and world.memory.kept == {"a"}


def test_a_change_of_order_is_heeded_by_what_has_not_begun() -> None:
    world = World()
    world.want("a", "b")
    world.want("c", "a")
    assert world.memory.reading == {"c", "a"}
    world.reader.work()
    world.reader.work()
    world.want("c", "a")
    assert sorted(world.read) == ["a", "c"]


def test_what_nobody_waits_for_is_dropped_the_longest_unused_first() -> None:
    world = World()
    for key in "ab":
        world.memory.keep(key, Thing(key, 40))
    world.memory.touch("a")
    world.memory.keep("c", Thing("c", 40))
    assert world.memory.kept == {"a", "c"} and world.memory.dropped == 1
    world.want("d")
    world.reader.work()
    world.want("d")
    assert world.memory.kept == {"c", "d"}
    assert world.memory.find("a") is None and world.memory.find("c") == Thing("c", 40)


def test_what_is_refused_is_told_once_and_read_anew() -> None:
    world = World()
    for _ in range(2):
        assert world.want("bad") == {}
        world.reader.work()
        assert world.want("bad", "a")["bad"].code == "adapter-damaged"
        world.reader.work()
    assert world.read == ["bad", "a", "bad"] and world.want() == {} and world.memory.kept == {"a"}


def test_errors_of_ours_are_not_swallowed() -> None:
    world = World()
    world.want("a")
    future, _ = world.reader.asked.pop()
    future.set_running_or_notify_cancel()
    future.set_exception(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        world.want("a")
    world.memory.close()
    assert world.reader.closed
