"""Who has which block of the key/value cache: free, in use by so many sequences, or kept for whoever begins alike.

A block is free, used (by one or more sequences), or idle: nobody's, but remembered under the key of the tokens that it
holds. Idle blocks are given away when no free one is left, the one that was used longest ago first.
This module knows block numbers and keys; it holds no tensors.
"""

from __future__ import annotations

import heapq
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np


@dataclass(frozen=True, slots=True)
class BlockKey:
    """What a full block holds. owner: who may read it (adapter version, tenant). chain: a digest of all tokens of the
    sequence up to the block's last.
    """

    owner: Hashable
    chain: bytes


def block_keys(owner: Hashable, ids: Sequence[int], block_tokens: int) -> list[BlockKey]:
    """The keys of the full blocks of a sequence that begins with these tokens."""
    keys, chain = [], b""
    for stop in range(block_tokens, len(ids) + 1, block_tokens):
        chain = blake2b(chain + array("q", ids[stop - block_tokens : stop]).tobytes(), digest_size=16).digest()
        keys.append(BlockKey(owner, chain))
    return keys


@dataclass(frozen=True, slots=True)
class Grant:
    """A block that was given out. stale: it holds what somebody left. moved_to: what it holds is to be copied to this
    block first, where it is still remembered.
    """

    block: int
    stale: bool = False
    moved_to: int | None = None


class BlockPool:
    """Blocks 0 … total - 1."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.is_free = np.ones(total, dtype=np.bool_)
        self._users = [0] * total
        self._key_of: list[BlockKey | None] = [None] * total
        self._block_of: dict[BlockKey, int] = {}
        self._idle: OrderedDict[BlockKey, None] = OrderedDict()
        self._free_count = total
        # The highest free block is given first, so the beginning of the pool stays whole. A block that was taken by
        # number stays listed, and is passed over when it comes up.
        self._heap = [-block for block in reversed(range(total))]
        self._listed = [True] * total

    @property
    def used(self) -> int:
        """Blocks that sequences hold."""
        return self.total - self._free_count - len(self._idle)

    @property
    def cached(self) -> int:
        """Blocks that nobody holds but that are remembered."""
        return len(self._idle)

    @property
    def available(self) -> int:
        """Blocks that can be given out."""
        return self._free_count + len(self._idle)

    def users(self, block: int) -> int:
        """How many sequences hold a block."""
        return self._users[block]

    def take(self, wanted: int) -> Grant:
        """A block for one user: the wanted one, unless a sequence holds it or it does not exist.

        Only while a block is available. An idle block that is wanted gives up its place, not its memory: that goes on
        elsewhere, and the block that was used longest ago is forgotten for it.
        """
        if not 0 <= wanted < self.total or self._users[wanted]:
            return self._take_any()
        if self.is_free[wanted]:
            self._use(wanted)
            return Grant(wanted)
        key = self._key_of[wanted]
        assert key is not None
        if not self._free_count and next(iter(self._idle)) == key:
            return self._take_any()
        home = self._take_any().block
        self._users[home] = 0
        self._key_of[wanted], self._key_of[home], self._block_of[key] = None, key, home
        self._use(wanted)
        return Grant(wanted, stale=True, moved_to=home)

    def share(self, block: int) -> None:
        """One more user of a block that is remembered."""
        self._users[block] += 1
        key = self._key_of[block]
        assert key is not None
        self._idle.pop(key, None)

    def release(self, block: int) -> bool:
        """One user less. True when the block is free now: what it holds must be wiped out."""
        self._users[block] -= 1
        if self._users[block]:
            return False
        key = self._key_of[block]
        if key is not None:
            self._idle[key] = None
            return False
        self.is_free[block] = True
        self._free_count += 1
        if not self._listed[block]:
            self._listed[block] = True
            heapq.heappush(self._heap, -block)
        return True

    def remember(self, block: int, key: BlockKey) -> None:
        """Keep what a used block holds under a key, unless that is kept already; it counts as used just now."""
        if key in self._idle:
            self._idle.move_to_end(key)
        if self._key_of[block] is None and key not in self._block_of:
            self._key_of[block] = key
            self._block_of[key] = block

    def find(self, keys: Sequence[BlockKey]) -> list[int]:
        """The blocks of the longest beginning of these keys that is remembered."""
        found = []
        for key in keys:
            if key not in self._block_of:
                break
            found.append(self._block_of[key])
        return found

    def _take_any(self) -> Grant:
        while self._free_count:
            block = -heapq.heappop(self._heap)
            self._listed[block] = False
            if self.is_free[block]:
                self._use(block)
                return Grant(block)
        key, _ = self._idle.popitem(last=False)
        block = self._block_of.pop(key)
        self._key_of[block] = None
        self._use(block)
        return Grant(block, stale=True)

    def _use(self, block: int) -> None:
        if self.is_free[block]:
            self.is_free[block] = False
            self._free_count -= 1
        self._users[block] = 1
