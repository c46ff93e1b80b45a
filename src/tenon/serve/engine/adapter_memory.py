"""Adapters in host memory, ready for the bank: read ahead in the order of need, and kept as long as there is room.

One thread reads, hashes, checks and converts, so that a pass never waits for a disk. What is waited for is kept; of the
rest, what was not used for longest goes first. All methods belong to the thread that owns the bank.
This module does not know what an adapter is made of, nor how places are given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Generic, Protocol, TypeVar

from tenon.errors import AdapterError
from tenon.serve.jobs import AdapterRef

# One is being read, the next one waits for the same thread: so it is busy, and the order may still change.
_READS_AT_A_TIME = 2


class Sized(Protocol):
    """An adapter in memory."""

    @property
    def size_bytes(self) -> int:
        """What it takes."""
        ...


T = TypeVar("T", bound=Sized)


class AdapterMemory(Generic[T]):
    """Adapters by key, at most `most_bytes` of them, and one more."""

    def __init__(
        self,
        read: Callable[[AdapterRef], T],
        *,
        most_bytes: int,
        reader: Executor,
        on_read: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        """read: called by the reader; raises AdapterError. reader: of one thread. on_read: called by another thread
        when something has been read or refused; `want` and `find` then know it.
        """
        self._read, self._most_bytes, self._reader, self._on_read = read, most_bytes, reader, on_read
        self._clock = clock
        self._kept: dict[str, T] = {}  # the longest unused first
        self._reading: dict[str, Future[tuple[T, float]]] = {}
        self._wanted: frozenset[str] = frozenset()
        self.reads, self.read_seconds, self.dropped = 0, 0.0, 0

    @property
    def kept(self) -> frozenset[str]:
        """Keys of what is in memory."""
        return frozenset(self._kept)

    @property
    def reading(self) -> frozenset[str]:
        """Keys of what is being read, or is next."""
        return frozenset(self._reading)

    @property
    def size_bytes(self) -> int:
        """What everything that is kept takes."""
        return sum(kept.size_bytes for kept in self._kept.values())

    def want(self, adapters: Sequence[AdapterRef]) -> dict[str, AdapterError]:
        """What is needed, first things first: have it read ahead, as much as there is room for, at least the first.

        Returns the errors of what was refused; it is read anew when it is wanted again.
        """
        refused = self._take_in()
        self._wanted = frozenset(adapter.key for adapter in adapters)
        soon, room = list[AdapterRef](), self._most_bytes
        for place, adapter in enumerate(adapters):
            kept = self._kept.get(adapter.key)
            room -= adapter.size_bytes if kept is None else kept.size_bytes
            if room < 0 and place:
                break
            if kept is None and adapter.key not in refused:
                soon.append(adapter)
        self._begin(soon[:_READS_AT_A_TIME])
        self._make_room()
        return refused

    def find(self, key: str) -> T | None:
        """What is in memory."""
        return self._kept.get(key)

    def take(self, key: str) -> T:
        """What is in memory, which then is no more. Raises KeyError."""
        return self._kept.pop(key)

    def drop(self, key: str) -> None:
        """Forget what is in memory, if it is there: it is not as it should be."""
        self._kept.pop(key, None)

    def touch(self, key: str) -> None:
        """It was used just now."""
        if key in self._kept:
            self._kept[key] = self._kept.pop(key)

    def keep(self, key: str, adapter: T) -> None:
        """Put something in memory, as used just now."""
        self._kept.pop(key, None)
        self._kept[key] = adapter
        self._make_room()

    def close(self) -> None:
        """Read nothing more."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _take_in(self) -> dict[str, AdapterError]:
        """Keep what has been read. Raises what reading raised, but for AdapterError."""
        refused: dict[str, AdapterError] = {}
        for key in [key for key, future in self._reading.items() if future.done()]:
            try:
                adapter, seconds = self._reading.pop(key).result()
            except AdapterError as error:
                refused[key] = error
                continue
            self._kept[key] = adapter
            self.reads, self.read_seconds = self.reads + 1, self.read_seconds + seconds
        return refused

    def _begin(self, adapters: Sequence[AdapterRef]) -> None:
        wanted = {adapter.key for adapter in adapters}
        for key in [key for key, future in self._reading.items() if key not in wanted and future.cancel()]:
            del self._reading[key]
        for adapter in adapters:
            if adapter.key not in self._reading and len(self._reading) < _READS_AT_A_TIME:
                future = self._reader.submit(self._timed, adapter)
                self._reading[adapter.key] = future
                future.add_done_callback(lambda _done: self._on_read())

    def _timed(self, adapter: AdapterRef) -> tuple[T, float]:
        start = self._clock()
        found = self._read(adapter)
        return found, self._clock() - start

    def _make_room(self) -> None:
        """Drop what nobody waits for, the longest unused first, until the rest fits."""
        over = self.size_bytes - self._most_bytes
        for key in [key for key in self._kept if key not in self._wanted]:
            if over <= 0:
                return
            over -= self._kept.pop(key).size_bytes
            self.dropped += 1
