"""The key/value cache: what generation remembers of the tokens it has seen, in blocks that follow real lengths.

A place holds one sequence from its first token on, as a table of blocks. Blocks come from one pool as a sequence grows;
full ones can be remembered under the key of their tokens for sequences that begin alike (see `models.blocks`). Each
place has its home, an equal part of the pool: as long as a sequence finds the blocks there free it lies in one piece,
and pieces at equal distances are read where they lie.

Shape legend: N blocks, B tokens of a block, K key/value heads, E head dimension, T tokens of a pass.
This module knows no sampling and no adapters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tenon.bases.facts import ModelFacts
from tenon.kernels.gpu import can_fuse
from tenon.models.attention import fused_attention
from tenon.models.blocks import BlockKey, BlockPool
from tenon.models.cache_reads import Gathered, PlaceGroup, Strided, alike_groups, restore_order, strided_runs
from tenon.models.paged import PagedPass

# Tokens of a block: measured in docs/decisions/paged-cache.md.
BLOCK_TOKENS = 16


class KvCache:
    """Keys and values of every layer, allocated once."""

    def __init__(
        self,
        facts: ModelFacts,
        *,
        places: int,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        budget_bytes: int | None = None,
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        """places: most sequences at a time. tokens: the longest sequence, prompt and answer together.

        budget_bytes: keys and values of all layers; None: enough for every place to be full at once.
        """
        blocks = places * -(-tokens // block_tokens)
        if budget_bytes is not None:
            blocks = max(1, min(blocks, budget_bytes // token_bytes(facts, dtype) // block_tokens))
        # One block more, which stays zero: what short sequences are filled up with where blocks are gathered.
        shape = (facts.layers, blocks + 1, block_tokens, facts.kv_heads, facts.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * places
        self.block_tokens, self.pool = block_tokens, BlockPool(blocks)
        self.home_blocks = max(1, blocks // places)
        self._tokens = tokens
        self._tables: list[list[int]] = [[] for _ in range(places)]
        # The same for kernels; what lies behind a table's end is of no meaning.
        self.pages_PM = np.zeros((places, -(-tokens // block_tokens) + 1), dtype=np.int32)
        self._in_one_piece = [True] * places

    @property
    def capacity_tokens(self) -> int:
        """The longest sequence that a place can hold, when it has the whole pool."""
        return min(self._tokens, self.pool.total * self.block_tokens)

    # ---- sequences come, grow and go ----------------------------------------------------------------------------

    def begin(self, place: int, tokens: int, keys: Sequence[BlockKey] = (), *, spare_blocks: int = 0) -> int | None:
        """Give an empty place the blocks of a sequence of so many tokens; returns how many of them it holds already.

        keys: of the full blocks that may be taken from what is remembered, from the first on. None comes back, and
        nothing is changed, when the pool does not have the blocks and spare_blocks beside.
        """
        hits, needed = self.pool.find(keys), self._blocks(tokens)
        # Blocks of one's own lie in one piece, which is faster; where memory is short the same blocks are shared.
        shares = 2 * (self.pool.used + needed) > self.pool.total
        shared = sum(self.pool.users(block) > 0 for block in hits) if shares else 0
        if needed - shared + spare_blocks > self.pool.available:
            return None
        for block in hits:
            self.pool.share(block)
        for block in hits:
            self._append(place, block if shares else self._own(place, block))
        grown = self.grow(place, tokens)
        assert grown
        self.lengths[place] = len(hits) * self.block_tokens
        return self.lengths[place]

    def grow(self, place: int, tokens: int) -> bool:
        """Let a place have the blocks of so many tokens; False, and nothing is changed, when the pool lacks them."""
        lacking = self._blocks(tokens) - len(self._tables[place])
        if lacking > self.pool.available:
            return False
        for _ in range(lacking):
            self._append(place, self._take(place))
        return True

    def lacks(self, place: int, tokens: int) -> bool:
        """Whether a place needs more blocks than it has to hold so many tokens."""
        return self._blocks(tokens) > len(self._tables[place])

    def clear(self, place: int, keep_tokens: int = 0) -> None:
        """Forget a place but for its first tokens; blocks that are not remembered are free.

        What is forgotten becomes zero: a masked NaN of one sequence would still spoil the next one's attention.
        """
        kept, table = self._blocks(keep_tokens), self._tables[place]
        if keep_tokens % self.block_tokens and keep_tokens < self.lengths[place]:
            first = keep_tokens % self.block_tokens
            self.keys[:, table[kept - 1], first:] = 0
            self.values[:, table[kept - 1], first:] = 0
        if kept < len(table):
            # The last block first: of a sequence that is remembered the end is forgotten before what it hangs on.
            self._wipe([block for block in reversed(table[kept:]) if self.pool.release(block)])
            del table[kept:]
            self._in_one_piece[place] = all(block == table[0] + i for i, block in enumerate(table))
        self.lengths[place] = min(self.lengths[place], keep_tokens)

    def remember(self, place: int, keys: Sequence[BlockKey]) -> None:
        """Keep a place's first full blocks under these keys, also after it is cleared."""
        for block, key in zip(self._tables[place], keys, strict=False):
            self.pool.remember(block, key)

    def prefix(self, place: int) -> tuple[Tensor, Tensor]:
        """A copy of what a place holds: keys and values (layers, length, K, E), for `restore`."""
        line = self._line(place, 0, self.lengths[place])
        return self.keys.flatten(1, 2)[:, line], self.values.flatten(1, 2)[:, line]

    def restore(self, place: int, prefix: tuple[Tensor, Tensor]) -> None:
        """Let a place that holds nothing yet begin with what `prefix` copied."""
        length = prefix[0].shape[1]
        grown = self.grow(place, length)
        assert grown and not self.lengths[place]
        line = self._line(place, 0, length)
        self.keys.flatten(1, 2)[:, line], self.values.flatten(1, 2)[:, line] = prefix
        self.lengths[place] = length

    def extend(self, places: tuple[int, ...], new_tokens: tuple[int, ...]) -> CachedAttention | PagedPass:
        """Attention of one pass that appends new_tokens[i] tokens to places[i]; call `commit` on it afterwards.

        The pool must have the blocks: see `grow`.
        """
        for place, new in zip(places, new_tokens, strict=True):
            grown = self.grow(place, self.lengths[place] + new)
            assert grown
        if can_fuse(self.keys.device, self.keys.dtype):
            return PagedPass(self, places, new_tokens)
        return CachedAttention(self, places, new_tokens)

    def commit(self, places: Sequence[int], new_tokens: Sequence[int]) -> None:
        """Count a pass's tokens as seen."""
        for place, new in zip(places, new_tokens, strict=True):
            self.lengths[place] += new

    # ---- where things lie ---------------------------------------------------------------------------------------

    def first_block(self, place: int) -> int | None:
        """The first block of a place that lies in one piece."""
        return self._tables[place][0] if self._in_one_piece[place] else None

    def is_clear(self, place: int, tokens: int) -> bool:
        """Whether nobody else's memory lies in the first tokens from where a place in one piece begins."""
        table = self._tables[place]
        stop = table[0] + self._blocks(tokens)
        return stop <= self.pool.total and bool(self.pool.is_free[table[-1] + 1 : stop].all())

    def tables(self, places: Sequence[int], blocks: int) -> np.ndarray:
        """(places, blocks) int64: what each holds, filled up with the block of zeros."""
        filled = np.full((len(places), blocks), self.pool.total, dtype=np.int64)
        for row, place in zip(filled, places, strict=True):
            row[: len(self._tables[place])] = self._tables[place][:blocks]
        return filled

    def slots(self, place: int, first: int, count: int) -> np.ndarray:
        """(count) int64: where tokens of a place lie in the line of all blocks."""
        if count == 1:
            block, offset = divmod(first, self.block_tokens)
            return np.array([self._tables[place][block] * self.block_tokens + offset])
        position = np.arange(first, first + count)
        return np.array(self._tables[place])[position // self.block_tokens] * self.block_tokens + (
            position % self.block_tokens
        )

    def _line(self, place: int, first: int, count: int) -> Tensor:
        return torch.from_numpy(self.slots(place, first, count)).to(self.keys.device)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    # ---- blocks -------------------------------------------------------------------------------------------------

    def _append(self, place: int, block: int) -> None:
        table = self._tables[place]
        self._in_one_piece[place] &= not table or block == table[-1] + 1
        self.pages_PM[place, len(table)] = block
        table.append(block)

    def _take(self, place: int) -> int:
        """The block that a place wants next, or another one; zero, as all that is free."""
        table = self._tables[place]
        grant = self.pool.take(table[-1] + 1 if table else self._home(place))
        if grant.moved_to is not None:
            self._copy(grant.block, grant.moved_to)
        if grant.stale:
            self._wipe([grant.block])
        return grant.block

    def _home(self, place: int) -> int:
        """Where a sequence begins: at its own home, or at another's that has not been built upon."""
        homes = range(0, self.pool.total, self.home_blocks)
        own = min(place * self.home_blocks, homes[-1])
        return next((block for block in (own, *homes) if not self.pool.users(block)), own)

    def _own(self, place: int, block: int) -> int:
        """A block of the place's own in exchange for one that it shares."""
        own = self._take(place)
        self._copy(block, own)
        self._wipe([block] if self.pool.release(block) else [])
        return own

    def _copy(self, source: int, target: int) -> None:
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]

    def _wipe(self, blocks: list[int]) -> None:
        if blocks:
            self.keys[:, blocks] = 0
            self.values[:, blocks] = 0


class CachedAttention:
    """Attention of one forward pass over a cache (an `Attention`); the pass's tokens are packed place by place.

    Places attend in groups of like numbers of new tokens: those that grow by one token together, the others apart, so
    that a long prompt does not stretch the queries of a hundred places that only decode. Of a group, those that lie at
    equal distances are read in place.
    """

    def __init__(self, cache: KvCache, places: tuple[int, ...], new_tokens: tuple[int, ...]) -> None:
        device = cache.keys.device
        past = np.array([cache.lengths[p] for p in places], dtype=np.int64)
        new = np.array(new_tokens, dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(new)[:-1]])
        step_T = np.arange(int(new.sum())) - np.repeat(starts, new)
        self._cache, self._places, self._new = cache, places, new_tokens
        self.positions_T = torch.from_numpy(np.repeat(past, new) + step_T).to(device)
        slots = [cache.slots(p, int(n), c) for p, n, c in zip(places, past, new_tokens, strict=True)]
        self._slot_T = torch.from_numpy(np.concatenate(slots)).to(device)
        members: list[np.ndarray] = []
        self._groups: list[PlaceGroup] = []
        for group in alike_groups(places, new_tokens):
            for rows, read in self._reads(group, past + new):
                members.append(np.array(rows, dtype=np.int64))
                self._groups.append(PlaceGroup(read, past[rows], new[rows], starts[rows], device))
        self._restore_T = restore_order(members, new, starts, device)

    def _reads(self, group: list[int], ends: np.ndarray) -> list[tuple[list[int], Strided | Gathered]]:
        """The group's rows in parts, each with how its contexts are read."""
        cache, firsts = self._cache, {i: self._cache.first_block(self._places[i]) for i in group}
        whole = {i: first for i, first in firsts.items() if first is not None}
        home_tokens = cache.home_blocks * cache.block_tokens
        at_home = [i for i in whole if ends[i] <= home_tokens]
        reach = max((int(ends[i]) for i in at_home), default=0)
        together = {i: whole[i] for i in at_home if cache.is_clear(self._places[i], reach)}
        runs = strided_runs(together) + [[i] for i in whole if i not in together]
        found: list[tuple[list[int], Strided | Gathered]] = []
        for rows in runs:
            stride = whole[rows[1]] - whole[rows[0]] if len(rows) > 1 else 1
            found.append((rows, Strided(whole[rows[0]], stride, len(rows), int(ends[rows].max()))))
        scattered = [i for i in group if i not in whole]
        if scattered:
            context = int(ends[scattered].max())
            table = cache.tables([self._places[i] for i in scattered], -(-context // cache.block_tokens))
            found.append((scattered, Gathered(torch.from_numpy(table).to(cache.keys.device), context)))
        return found

    def attend(
        self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, *, scale: float, window: int, record: bool
    ) -> tuple[Tensor, None]:
        """Write the new keys and values, then attend each new token to its place's past and itself.

        Raises ValueError when it is to be recorded: a cache is for inference.
        """
        if record:
            raise ValueError("attention over a cache has no backward pass")
        keys_NBKE, values_NBKE = self._cache.keys[layer], self._cache.values[layer]
        keys_NBKE.flatten(0, 1).index_copy_(0, self._slot_T, k_TKE)
        values_NBKE.flatten(0, 1).index_copy_(0, self._slot_T, v_TKE)
        outputs = [
            fused_attention(
                group.queries(q_THE),
                group.read.contexts(keys_NBKE),
                group.read.contexts(values_NBKE),
                group.mask(window),
                scale=scale,
            )
            .transpose(1, 2)
            .reshape(-1, *q_THE.shape[1:])
            for group in self._groups
        ]
        stream = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return stream if self._restore_T is None else stream.index_select(0, self._restore_T), None

    def commit(self) -> None:
        """Count the pass's tokens as seen; call once, after the forward pass."""
        self._cache.commit(self._places, self._new)


def token_bytes(facts: ModelFacts, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one token in all layers."""
    return facts.kept_elements * dtype.itemsize
