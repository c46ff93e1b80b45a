"""Passes as CUDA graphs, recorded once for each number of tokens and then replayed.

A pass of few tokens computes little, and launching its kernels one by one takes longer than running them. A graph holds
the launches with their addresses, so whatever differs from pass to pass has a fixed place: token ids, places in the
sequences, pages, slots. Passes are filled up to a bucket with tokens that are not written and see nothing. Adapters are
found in the bank's tables, so that one graph serves any of them; only a larger rank than before, or more slots, needs
graphs of its own.

Few tokens are taken one by one by every kernel; from some dozens on those of one slot share a program.

Shape legend: T tokens of a bucket, R rows, M pages of a row, N tokens alone in their row, B blocks of others, D hidden.
This module knows no requests and no sampling.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tenon.adapters.bank import AdapterBank
from tenon.adapters.table_bank import BARE, BankTables, TableKind
from tenon.bases.facts import STACKS
from tenon.batch import IGNORE, NO_SLOT, AttentionLayout, Batch, SlotRoutes
from tenon.data.pack import list_tiles
from tenon.infer.rows import Taken
from tenon.kernels.blocks_triton import TILE
from tenon.kernels.low_rank_few_triton import FewTokens
from tenon.kernels.paged_attention import QUERY_BLOCK, Pages, list_queries
from tenon.models.cache import KvCache
from tenon.models.decoder import Decoder
from tenon.models.paged import PagedAttention

# Tokens of the smallest buckets; then whole sixteens, as far as all tokens are alone in their rows; or up to FEW.
_SMALL = (1, 2, 4, 8)
_STEP = 16
FEW = 64
# Tokens of larger buckets are whole multiples of this.
_WIDE = 128
# Tokens of one row that are taken one by one read its context as often as they are.
_SHORT_CONTEXT = 512
_MOST_MODULES = max(len(modules) for modules in STACKS.values())


@dataclass(frozen=True, slots=True)
class Bucket:
    """tokens of a pass, its own and those that fill up; few: they are taken one by one."""

    tokens: int
    few: bool


def few_buckets(most_rows: int) -> tuple[Bucket, ...]:
    """Those whose tokens are taken one by one."""
    large = range(_STEP, max(most_rows, FEW) + _STEP, _STEP)
    return tuple(Bucket(tokens, few=True) for tokens in (*_SMALL, *large))


def wide_buckets(pass_tokens: int) -> tuple[Bucket, ...]:
    """The others, for passes of up to so many tokens. A place is left for one that fills up."""
    return tuple(Bucket(tokens, few=False) for tokens in range(_WIDE, pass_tokens + _WIDE + 1, _WIDE))


class PassGraphs:
    """The graphs over one decoder, bank and cache. Only where `can_record`."""

    def __init__(self, decoder: Decoder, bank: AdapterBank | None, cache: KvCache, *, pass_tokens: int) -> None:
        """pass_tokens: longer passes are not recorded."""
        self._decoder, self._cache = decoder, cache
        self._tables = None if bank is None else BankTables(bank, decoder)
        self._few, self._wide = few_buckets(len(cache.lengths)), wide_buckets(pass_tokens)
        self._graphs: dict[tuple[Bucket, TableKind], _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        decoder.keep_positions(cache.capacity_tokens + 1)

    @staticmethod
    def can_record(decoder: Decoder) -> bool:
        """Whether kernels are fused and the whole base is on this GPU."""
        return decoder.fuse and decoder.device.type == "cuda" and decoder.walk.resident

    def record_all(self) -> None:
        """Record every bucket now, for the bare base and for adapters, so that no request waits for it."""
        for bucket in reversed((*self._few, *self._wide)):
            self._graph(bucket, BARE)
            if self._tables is not None:
                self._graph(bucket, self._tables.usual(few=bucket.few))

    def run(self, passing: Sequence[Taken]) -> Tensor | None:
        """Hidden states (tokens, D) in the order given, and the tokens are in the cache. Read them before the next run.

        Rows of one slot are neighbours, and their places have the blocks. None, and nothing is done, for a pass that
        fits no bucket.
        """
        bucket = self._bucket(passing)
        if bucket is None:
            return None
        graph = self._graph(bucket, self._kind({taken.slot for taken in passing}, few=bucket.few))
        tokens = graph.inputs.fill(passing, self._cache)
        graph.graph.replay()
        self._cache.commit([taken.place for taken in passing], [len(taken.ids) for taken in passing])
        return graph.hidden_TD[:tokens]

    def _bucket(self, passing: Sequence[Taken]) -> Bucket | None:
        """The smallest bucket for a pass."""
        tokens = sum(len(taken.ids) for taken in passing)
        several = [taken.position + len(taken.ids) for taken in passing if len(taken.ids) > 1]
        few = tokens <= self._few[-1].tokens
        if not several or (tokens <= FEW and max(several) <= _SHORT_CONTEXT):
            return next(bucket for bucket in self._few if bucket.tokens >= tokens) if few else None
        return next((bucket for bucket in self._wide if bucket.tokens > tokens), None)

    def _kind(self, slots: Collection[int], *, few: bool) -> TableKind:
        return BARE if self._tables is None else self._tables.kind(slots, few=few)

    def _graph(self, bucket: Bucket, kind: TableKind) -> _Graph:
        if (bucket, kind) not in self._graphs:
            # What reads tables that have moved is of no use any more.
            for key in [k for k in self._graphs if k[0] == bucket and replace(k[1], moves=kind.moves) == kind]:
                del self._graphs[key]
            self._graphs[bucket, kind] = self._record(bucket, kind)
        return self._graphs[bucket, kind]

    @torch.inference_mode()
    def _record(self, bucket: Bucket, kind: TableKind) -> _Graph:
        bank = None if self._tables is None or kind == BARE else self._tables.of(kind)
        slots = 0 if bank is None else bank.bank.table_slots
        inputs = _Inputs(bucket, self._cache, slots=slots)
        batch = inputs.batch(self._decoder, self._cache.capacity_tokens, width=_MOST_MODULES * kind.rank)
        attention = PagedAttention(self._cache, inputs.pages)
        inputs.fill((), self._cache)
        # Once as usual: what is missing is compiled. Tokens that only fill up change nothing.
        self._decoder.forward(batch, bank, attention)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden_TD = self._decoder.forward(batch, bank, attention)
        return _Graph(graph, inputs, batch, hidden_TD)


class _Inputs:
    """The fixed places of one bucket's inputs, filled by one copy to the device."""

    def __init__(self, bucket: Bucket, cache: KvCache, *, slots: int) -> None:
        """slots: of the bank's tables; 0: the bare base."""
        tokens, places = bucket.tokens, len(cache.lengths)
        self._bucket = bucket
        self._rows = min(tokens, places)
        ones = 0 if bucket.few else self._rows
        blocks = 0 if bucket.few else tokens // QUERY_BLOCK + self._rows
        tiles = 0 if bucket.few else tokens // TILE + slots + 1
        # Tiles are int64, as all routes are: two places each. The pages come last: of these only those in use are sent.
        sizes = (tokens, tokens, tokens, tokens, ones, 2 * blocks, 6 * tiles, self._rows * cache.pages_PM.shape[1])
        starts = np.cumsum([0, *(-(-size // 4) * 4 for size in sizes)])
        self._host = torch.zeros(int(starts[-1]), dtype=torch.int32, pin_memory=True)
        self._device = self._host.to(cache.keys.device)
        self._table_start, self._pages_a_row = int(starts[-2]), cache.pages_PM.shape[1]
        cuts = [slice(int(start), int(start) + size) for start, size in zip(starts, sizes, strict=False)]
        host = [self._host.numpy()[cut] for cut in cuts]
        self._ids_T, self._positions_T, self._slots_T, self._rows_T, self._ones_N = host[:5]
        self._blocks_B2, self._tiles_N3 = host[5].reshape(-1, 2), host[6].view(np.int64).reshape(-1, 3)
        self._table_RM = host[7].reshape(self._rows, -1)
        there = [self._device[cut] for cut in cuts]
        self.ids_T, self.position_T, self.slot_T = there[:3]
        self._tiles_there_N3 = there[6].view(torch.int64).view(-1, 3)
        every = torch.arange(tokens, dtype=torch.int32, device=self._device.device)
        self.pages = Pages(
            there[7].view(self._rows, -1),
            there[3],
            self.position_T,
            every if bucket.few else there[4],
            there[5].view(-1, 2),
        )

    def fill(self, passing: Sequence[Taken], cache: KvCache) -> int:
        """Copy a pass to the device, and fill up; returns the tokens of the pass."""
        new = np.array([len(taken.ids) for taken in passing], dtype=np.int32)
        count = int(new.sum())
        self._positions_T[count:], self._slots_T[count:], self._rows_T[count:] = -1, NO_SLOT, 0
        if count:
            past = np.array([taken.position for taken in passing], dtype=np.int32)
            row_T = np.repeat(np.arange(len(new), dtype=np.int32), new)
            starts = np.concatenate([[0], np.cumsum(new)[:-1]]).astype(np.int32)
            self._ids_T[:count] = list(itertools.chain.from_iterable(taken.ids for taken in passing))
            self._positions_T[:count] = np.arange(count, dtype=np.int32) + (past - starts)[row_T]
            self._slots_T[:count] = np.array([taken.slot for taken in passing], dtype=np.int32)[row_T]
            self._rows_T[:count] = row_T
            used = -(-int((past + new).max()) // cache.block_tokens)
            self._table_RM[: len(new), :used] = cache.pages_PM[[taken.place for taken in passing], :used]
        if not self._bucket.few:
            self._list(new.tolist(), count)
        sent = self._table_start + len(new) * self._pages_a_row
        self._device[:sent].copy_(self._host[:sent], non_blocking=True)
        return count

    def _list(self, new: Sequence[int], count: int) -> None:
        """Who attends alone, who in blocks, and whose slots are whose; what is left over points at what fills up."""
        ones, blocks = list_queries(new)
        self._ones_N[: len(ones)], self._ones_N[len(ones) :] = ones, self._bucket.tokens - 1
        self._blocks_B2[: len(blocks)], self._blocks_B2[len(blocks) :] = blocks, (self._bucket.tokens - 1, 0)
        tiles = list_tiles(self._slots_T[:count], TILE)
        self._tiles_N3[: len(tiles)], self._tiles_N3[len(tiles) :] = tiles, (NO_SLOT, 0, 0)

    def batch(self, decoder: Decoder, positions_end: int, *, width: int) -> Batch:
        """The pass as a Batch, whose tensors are the fixed places. width: the widest low-rank activations."""
        tokens = self._bucket.tokens
        return Batch(
            ids_T=self.ids_T,
            positions_T=self.position_T,
            labels_T=torch.full_like(self.ids_T, IGNORE),
            cu_seqlens=tuple(range(tokens + 1)),
            slots=(NO_SLOT,) * tokens,
            rows=tuple(range(tokens)),
            segments=(),
            attention=AttentionLayout((), None),
            supervised_L=self.ids_T.new_zeros(0),
            row_tokens=tokens,
            positions_end=positions_end,
            routes=self._routes(decoder, width),
        )

    def _routes(self, decoder: Decoder, width: int) -> SlotRoutes:
        none = torch.empty((0, 3), dtype=torch.int64, device=self.ids_T.device)
        listed = np.zeros((0, 3), dtype=np.int64)
        few = None
        if self._bucket.few:
            inputs = max(linear.inputs for linear in decoder.layers[0].stacks.values())
            taken = FewTokens.of(self.slot_T, width=width, inputs=inputs)
            few = (taken.slot_T, taken.part, taken.arrivals)
        return SlotRoutes(self._tiles_there_N3, none, none, True, (listed, listed), few=few)


@dataclass(frozen=True, slots=True)
class _Graph:
    """batch: holds the memory that the graph has addresses of. hidden_TD: where a replay leaves its hidden states."""

    graph: torch.cuda.CUDAGraph
    inputs: _Inputs
    batch: Batch
    hidden_TD: Tensor
