"""Passes of one token a row as CUDA graphs, recorded once for each number of rows and then replayed.

Continuing sequences by a token each reads every weight and computes little: launching the kernels one by one takes
longer than running them. A graph holds the launches with their addresses, so whatever differs from pass to pass has a
fixed place: token ids, places in the sequences, pages, slots. Rows are filled up to a bucket with such as are not
written and see nothing. Adapters are found in the bank's tables, so that one graph serves any of them; only a larger
rank than before, or more slots, needs graphs of its own.

Shape legend: R rows of a bucket, M pages of a row, D hidden.
This module knows no requests and no sampling.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tenon.adapters.bank import AdapterBank
from tenon.adapters.table_bank import BARE, BankTables, TableKind
from tenon.bases.facts import STACKS
from tenon.batch import IGNORE, NO_SLOT, AttentionLayout, Batch, SlotRoutes
from tenon.infer.rows import Taken
from tenon.kernels.low_rank_few_triton import FewTokens
from tenon.kernels.paged_attention import Pages
from tenon.models.cache import KvCache
from tenon.models.decoder import Decoder
from tenon.models.paged import PagedAttention

# Rows of the smaller buckets; from there on whole sixteens.
_SMALL = (1, 2, 4, 8)
_STEP = 16
_MOST_MODULES = max(len(modules) for modules in STACKS.values())


def buckets(most_rows: int) -> tuple[int, ...]:
    """The numbers of rows that have graphs of their own."""
    large = range(_STEP, most_rows + _STEP, _STEP)
    return tuple(size for size in (*_SMALL, *large) if size < most_rows + _STEP and (size in _SMALL or most_rows > 8))


class DecodeGraphs:
    """The graphs over one decoder, bank and cache. Only where `can_record`."""

    def __init__(self, decoder: Decoder, bank: AdapterBank | None, cache: KvCache) -> None:
        self._decoder, self._cache = decoder, cache
        self._tables = None if bank is None else BankTables(bank, decoder)
        self._buckets = buckets(len(cache.lengths))
        self._graphs: dict[tuple[int, TableKind], _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        decoder.keep_positions(cache.capacity_tokens + 1)

    @staticmethod
    def can_record(decoder: Decoder) -> bool:
        """Whether kernels are fused and the whole base is on this GPU."""
        return decoder.fuse and decoder.device.type == "cuda" and decoder.walk.resident

    def fits(self, passing: Sequence[Taken]) -> bool:
        """Whether a pass takes one token from each row."""
        return len(passing) <= self._buckets[-1] and all(len(taken.ids) == 1 for taken in passing)

    def record_all(self) -> None:
        """Record every bucket now, for the bare base and for adapters, so that no request waits for it."""
        for rows in reversed(self._buckets):
            self._graph(rows, BARE)
            if self._tables is not None:
                self._graph(rows, self._tables.usual())

    def run(self, passing: Sequence[Taken]) -> Tensor:
        """Hidden states (rows, D) of one token each, and the tokens are in the cache. Read them before the next run.

        Rows of one slot are neighbours, and their places have the blocks.
        """
        rows = next(size for size in self._buckets if size >= len(passing))
        graph = self._graph(rows, self._kind({taken.slot for taken in passing}))
        graph.inputs.fill(passing, self._cache)
        graph.graph.replay()
        self._cache.commit([taken.place for taken in passing], [1] * len(passing))
        return graph.hidden_RD[: len(passing)]

    def _kind(self, slots: Collection[int]) -> TableKind:
        return BARE if self._tables is None else self._tables.kind(slots)

    def _graph(self, rows: int, kind: TableKind) -> _Graph:
        if (rows, kind) not in self._graphs:
            # What reads tables that have moved is of no use any more.
            for key in [key for key in self._graphs if key[0] == rows and replace(key[1], moves=kind.moves) == kind]:
                del self._graphs[key]
            self._graphs[rows, kind] = self._record(rows, kind)
        return self._graphs[rows, kind]

    @torch.inference_mode()
    def _record(self, rows: int, kind: TableKind) -> _Graph:
        bank = None if self._tables is None or kind == BARE else self._tables.of(kind)
        inputs = _Inputs(rows, self._cache, width=_MOST_MODULES * kind.rank)
        batch = inputs.batch(self._decoder, self._cache.capacity_tokens)
        attention = PagedAttention(self._cache, inputs.pages)
        inputs.fill((), self._cache)
        # Once as usual: what is missing is compiled. Rows that only fill up change nothing.
        self._decoder.forward(batch, bank, attention)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden_RD = self._decoder.forward(batch, bank, attention)
        return _Graph(graph, inputs, batch, hidden_RD)


class _Inputs:
    """The fixed places of one bucket's inputs, filled by one copy to the device."""

    def __init__(self, rows: int, cache: KvCache, *, width: int) -> None:
        """width: the widest low-rank activations."""
        self._rows, self._width = rows, width
        sizes = (rows, rows, rows, rows * cache.pages_PM.shape[1])
        starts = np.cumsum([0, *(-(-size // 4) * 4 for size in sizes)])
        self._host = torch.zeros(int(starts[-1]), dtype=torch.int32, pin_memory=True)
        self._device = self._host.to(cache.keys.device)
        cuts = [slice(int(start), int(start) + size) for start, size in zip(starts, sizes, strict=False)]
        self._ids, self._positions, self._slots, table = (self._host.numpy()[cut] for cut in cuts)
        self._table_RM = table.reshape(rows, -1)
        self.ids_R, self.position_R, self.slot_R, table_RM = (self._device[cut] for cut in cuts)
        arange_R = torch.arange(rows, dtype=torch.int32, device=self._device.device)
        none = torch.empty((0, 2), dtype=torch.int32, device=self._device.device)
        self.pages = Pages(table_RM.view(rows, -1), arange_R, self.position_R, arange_R, none)

    def fill(self, passing: Sequence[Taken], cache: KvCache) -> None:
        """Copy a pass to the device; the rows that it does not have fill up."""
        count = len(passing)
        self._positions[count:], self._slots[count:] = -1, NO_SLOT
        if count:
            places = [taken.place for taken in passing]
            self._ids[:count] = [taken.ids[0] for taken in passing]
            self._positions[:count] = [taken.position for taken in passing]
            self._slots[:count] = [taken.slot for taken in passing]
            used = int(self._positions[:count].max()) // cache.block_tokens + 1
            self._table_RM[:count, :used] = cache.pages_PM[places, :used]
        self._device.copy_(self._host, non_blocking=True)

    def _routes(self, decoder: Decoder) -> SlotRoutes:
        """Kernels take tokens one by one: there are no tiles."""
        inputs = max(linear.inputs for linear in decoder.layers[0].stacks.values())
        few = FewTokens.of(self.slot_R, width=self._width, inputs=inputs)
        none = torch.empty((0, 3), dtype=torch.int64, device=self.ids_R.device)
        listed = np.zeros((0, 3), dtype=np.int64)
        return SlotRoutes(none, none, none, True, (listed, listed), few=(few.slot_T, few.part, few.arrivals))

    def batch(self, decoder: Decoder, positions_end: int) -> Batch:
        """The pass as a Batch, whose tensors are the fixed places."""
        return Batch(
            ids_T=self.ids_R,
            positions_T=self.position_R,
            labels_T=torch.full_like(self.ids_R, IGNORE),
            cu_seqlens=tuple(range(self._rows + 1)),
            slots=(NO_SLOT,) * self._rows,
            rows=tuple(range(self._rows)),
            segments=(),
            attention=AttentionLayout((), None),
            supervised_L=self.ids_R.new_zeros(0),
            row_tokens=self._rows,
            positions_end=positions_end,
            routes=self._routes(decoder),
        )


@dataclass(frozen=True, slots=True)
class _Graph:
    """batch: holds the memory that the graph has addresses of. hidden_RD: where a replay leaves its hidden states."""

    graph: torch.cuda.CUDAGraph
    inputs: _Inputs
    batch: Batch
    hidden_RD: Tensor
