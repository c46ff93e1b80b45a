"""Which adapters a vLLM server has: a bounded number, under their digests, the longest idle one given up.

    FOLDER/<digest>/adapter_config.json, adapter_model.safetensors      what vLLM reads: written from what was checked
    FOLDER/nothing/…                                                    an adapter of zeros: see `using`

A name is never used for other weights, so that nothing vLLM remembers of one is ever wrong. When all places are taken
by adapters that are in use without a pause, the one that has been there for longest takes no new sequences once
somebody has waited for `patience_seconds`. Belongs to one event loop. This module knows no requests, and does not watch
vLLM.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch

from tenon.adapters.bank import SiteShape, Slot, SlotShape, lay_out
from tenon.adapters.peft_files import AdapterFiles, fill_slot, write_adapter
from tenon.bases.facts import MODULE_PATHS, ModelFacts, site_name
from tenon.errors import AdapterError
from tenon.serve.jobs import AdapterRef
from tenon.serve.vllm.process import BASE_NAME

NOTHING = "nothing"
# So often it is looked whether an adapter that is to go is still needed.
_LOOK_SECONDS = 0.1
ReadFiles = Callable[[AdapterRef], AdapterFiles]


@dataclass(slots=True, eq=False)
class _Place:
    """An adapter that vLLM has or is being given. users: sequences that need it; used, since: as counts, when it was
    last asked for and when it came. closing: it takes no more users.
    """

    key: str
    loading: asyncio.Future[None]
    since: int
    users: int = 0
    used: int = 0
    closing: bool = False


class VllmAdapters:
    """The adapters of one server."""

    def __init__(
        self,
        folder: Path,
        facts: ModelFacts,
        *,
        slots: int,
        max_rank: int,
        read: ReadFiles,
        base_by_adapter: bool = False,
        patience_seconds: float = 2.0,
    ) -> None:
        """folder: of its own, emptied by `clear`. max_rank: what vLLM was started for. read: raises AdapterError.

        base_by_adapter: ask the bare base through an adapter of zeros, for which vLLM has one slot more than `slots`.
        vLLM on a CPU (0.32) computes tokens without an adapter with whatever adapter its last slot holds.
        """
        self._folder, self._facts, self._slots, self._max_rank = folder, facts, slots, max_rank
        self._read, self._patience_seconds = read, patience_seconds
        self._base_by_adapter = base_by_adapter
        self._nothing: asyncio.Future[None] | None = None
        self._places: dict[str, _Place] = {}
        self._waiting: deque[asyncio.Event] = deque()
        self._clock = itertools.count(1)
        self.resident: frozenset[str] = frozenset()
        self.loads = 0

    @asynccontextmanager
    async def using(self, adapter: AdapterRef | None, client: httpx.AsyncClient) -> AsyncIterator[str]:
        """vLLM's name for the adapter (None: the bare base), which it keeps as long as the context lasts.

        Raises AdapterError when its files are refused, by us or by vLLM; httpx.TransportError when vLLM is gone.
        """
        if adapter is None:
            yield await self._base(client)
            return
        place = await self._place(adapter, client)
        place.users += 1
        place.used = next(self._clock)
        try:
            await asyncio.shield(place.loading)
            yield adapter.key
        finally:
            place.users -= 1
            if place.users == 0:
                self._wake()

    async def unload(self, key: str, client: httpx.AsyncClient) -> None:
        """Let an adapter go once no sequence needs it. Raises httpx.TransportError when vLLM is gone."""
        while (place := self._places.get(key)) is not None:
            if place.users == 0 and place.loading.done():
                await self._drop(place, client)
                self._wake()
                return
            await asyncio.sleep(_LOOK_SECONDS)

    def forget(self) -> None:
        """vLLM is gone, and what it had with it. What is being loaded fails by itself."""
        self._places.clear()
        self._nothing = None
        self.resident = frozenset()
        self._wake()

    def clear(self) -> None:
        """Remove all that was written for vLLM."""
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _base(self, client: httpx.AsyncClient) -> str:
        """vLLM's name for the bare base."""
        if not self._base_by_adapter:
            return BASE_NAME
        if self._nothing is None:
            self._nothing = asyncio.ensure_future(
                self._give(NOTHING, lambda: write_nothing(self._folder, self._facts), NOTHING, client)
            )
        giving = self._nothing
        try:
            await asyncio.shield(giving)
        finally:
            if self._nothing is giving and giving.done() and giving.exception() is not None:
                self._nothing = None  # whoever comes next tries again
        return NOTHING

    async def _place(self, adapter: AdapterRef, client: httpx.AsyncClient) -> _Place:
        """The adapter's place, made if need be. Those who wait for one come in the order in which they asked."""
        there = self._places.get(adapter.key)
        if there is not None and not there.closing:
            return there
        asked, turn = time.monotonic(), asyncio.Event()
        self._waiting.append(turn)
        try:
            while True:
                place, first = self._places.get(adapter.key), self._waiting[0] is turn
                if place is not None and (first or not place.closing):
                    place.closing = False
                    return place
                # Whoever is first stays it while vLLM is told to make room, so nobody else takes the place.
                if place is None and first and await self._make_room(client):
                    return self._begin(adapter, client)
                await self._wait(turn, asked)
        finally:
            self._waiting.remove(turn)
            self._wake()

    def _begin(self, adapter: AdapterRef, client: httpx.AsyncClient) -> _Place:
        loading = asyncio.ensure_future(self._load(adapter, client))
        place = self._places[adapter.key] = _Place(adapter.key, loading, next(self._clock))
        loading.add_done_callback(lambda _done: self._settle(place))
        return place

    def _settle(self, place: _Place) -> None:
        """An adapter has come, or could not be had."""
        failed = place.loading.cancelled() or place.loading.exception() is not None
        if self._places.get(place.key) is not place:
            return
        if failed:
            self._places.pop(place.key)
            self._wake()
        else:
            self.loads += 1
            self.resident |= {place.key}

    async def _wait(self, turn: asyncio.Event, asked: float) -> None:
        """Wait until a place may have come free; after some patience, see to it that one does."""
        turn.clear()
        left = self._patience_seconds - (time.monotonic() - asked)
        if left <= 0 and self._waiting[0] is turn and not any(place.closing for place in self._places.values()):
            min(self._places.values(), key=lambda place: place.since).closing = True
        try:
            await asyncio.wait_for(turn.wait(), max(left, self._patience_seconds / 4))
        except TimeoutError:
            return

    async def _make_room(self, client: httpx.AsyncClient) -> bool:
        """Whether a place is free, after giving up the one that has been idle for longest if need be."""
        if len(self._places) < self._slots:
            return True
        idle = [place for place in self._places.values() if place.users == 0 and place.loading.done()]
        if not idle:
            return False
        await self._drop(min(idle, key=lambda place: (not place.closing, place.used)), client)
        return len(self._places) < self._slots

    async def _drop(self, place: _Place, client: httpx.AsyncClient) -> None:
        self._places.pop(place.key)
        self.resident -= {place.key}
        await client.post("/v1/unload_lora_adapter", json={"lora_name": place.key})
        if place.key not in self._places:  # at once: whoever asks for it again writes it again
            shutil.rmtree(self._folder / place.key, ignore_errors=True)

    async def _load(self, adapter: AdapterRef, client: httpx.AsyncClient) -> None:
        await self._give(adapter.key, lambda: self._write(adapter), adapter.label, client)

    async def _give(self, name: str, write: Callable[[], Path], label: str, client: httpx.AsyncClient) -> None:
        """Write an adapter's files and have vLLM load them. label: what to call it when that is refused."""
        folder = await asyncio.to_thread(write)
        answer = await client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(folder)})
        if answer.status_code != 200:
            raise AdapterError(
                "adapter-engine",
                f"vLLM does not take {label}",
                got=answer.text[:300],
                hint="serve it with Tenon's own engine (without --engine vllm)",
            )

    def _write(self, adapter: AdapterRef) -> Path:
        """The adapter's files, checked against the base and written for vLLM alone. Raises AdapterError."""
        files = self._read(adapter)
        rank = max(site.rank for site in files.shape.sites.values())
        if rank > self._max_rank:
            raise AdapterError(
                "adapter-rank",
                f"{adapter.label} has rank {rank}, and this server's vLLM was started for ranks up to {self._max_rank}",
                hint="start the server again: it makes room for the highest rank that is registered",
            )
        slot = _slot(adapter.label, files.shape, self._facts)
        fill_slot(slot, files)
        folder = self._folder / adapter.key
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_adapter(folder, slot, base=BASE_NAME)
        return folder

    def _wake(self) -> None:
        """Let those who wait look again, in the order in which they came."""
        for turn in self._waiting:
            turn.set()


def write_nothing(parent: Path, facts: ModelFacts) -> Path:
    """An adapter of zeros in a folder under parent: who has it says what the base says, bit for bit."""
    shape = SlotShape({site_name(0, next(iter(MODULE_PATHS))): SiteShape(rank=1, scale=1.0)})
    folder = parent / NOTHING
    folder.mkdir(parents=True, exist_ok=True)
    write_adapter(folder, _slot(NOTHING, shape, facts), base=BASE_NAME)
    return folder


def _slot(name: str, shape: SlotShape, facts: ModelFacts) -> Slot:
    """A slot of zeros on this machine's CPU."""
    layout = lay_out(shape, facts)
    return Slot(name, layout, facts, parameters_P=torch.zeros(layout.elements))
