"""Which adapters are in the bank: a bounded number of slots, filled on first use, the longest idle one given up.

Files are read and checked by a thread of their own, so that a pass never waits for a disk; the matrices are copied into
the bank by the thread that owns it. Everything but `resident` belongs to that thread. This module knows no requests.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from tenon.adapters.bank import AdapterBank
from tenon.adapters.peft_files import AdapterFiles, load_adapter
from tenon.serve.jobs import AdapterRef

# Adapters that are read ahead of a free slot: the next one is then at hand, and the host's memory is not filled.
_READ_AHEAD = 2

ReadFiles = Callable[[AdapterRef], AdapterFiles]


@dataclass(slots=True)
class _Place:
    """A slot in use. users: sequences that were promised it. used: when it was last asked for, as a count."""

    slot: int
    users: int
    used: int


class Residency:
    """The adapters in the bank, by their key."""

    def __init__(self, bank: AdapterBank, *, slots: int, read: ReadFiles, on_read: Callable[[], None]) -> None:
        """slots: most adapters at a time. read: raises AdapterError. on_read: called, by another thread, when files
        are at hand or have been refused; ask again then.
        """
        self._bank, self._slots, self._read, self._on_read = bank, slots, read, on_read
        self._places: dict[str, _Place] = {}
        self._reading: dict[str, Future[AdapterFiles]] = {}
        self._clock = itertools.count()
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapters")
        self.resident: frozenset[str] = frozenset()
        self.loads = 0

    def acquire(self, adapter: AdapterRef) -> int | None:
        """The adapter's slot, kept until `release`; None while it is being read or no slot is free: ask again.

        Raises AdapterError when its files are refused; the next call then reads them anew.
        """
        place = self._places.get(adapter.key)
        if place is None:
            place = self._load(adapter)
        if place is None:
            return None
        place.users += 1
        place.used = next(self._clock)
        return place.slot

    def release(self, adapter: AdapterRef) -> None:
        """One sequence less needs the slot."""
        self._places[adapter.key].users -= 1

    def forget_others(self, wanted: Collection[str]) -> None:
        """Drop files that were read ahead for adapters that nobody waits for any more."""
        for key in self._reading.keys() - set(wanted):
            self._reading.pop(key).cancel()

    def close(self) -> None:
        """Read nothing more."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _load(self, adapter: AdapterRef) -> _Place | None:
        reading = self._reading.get(adapter.key)
        if reading is None:
            if len(self._reading) < _READ_AHEAD:
                reading = self._reader.submit(self._read, adapter)
                self._reading[adapter.key] = reading
                reading.add_done_callback(lambda _done: self._on_read())
            return None
        if not reading.done():
            return None
        if reading.exception() is not None:
            self._reading.pop(adapter.key)
        files = reading.result()
        if not self._make_room():
            return None
        self._reading.pop(adapter.key)
        place = _Place(load_adapter(self._bank, adapter.label, files), 0, 0)
        self._places[adapter.key] = place
        self.loads += 1
        self.resident = frozenset(self._places)
        return place

    def _make_room(self) -> bool:
        """Whether a slot is free, after giving up the one that has been idle for longest if need be."""
        if len(self._places) < self._slots:
            return True
        idle = [key for key, place in self._places.items() if place.users == 0]
        if not idle:
            return False
        gone = self._places.pop(min(idle, key=lambda key: self._places[key].used))
        self._bank.remove(gone.slot)
        return True
