"""How places of the cache attend together: which form a group, and how a group's contexts are read.

Shape legend: M places of a group, Q new tokens of the longest of them, C its context, N blocks, B tokens of a block,
K key/value heads, H query heads, E head dimension, T tokens of a pass. This module knows no pool of blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Places attend together while the one with fewer new tokens has at least this share of the other's, or lacks at most
# so many of them.
_GROUP_SHARE = 0.75
_GROUP_SLACK_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Strided:
    """Places that lie in one piece each, at equal distances (in blocks): their contexts are a view."""

    first: int
    stride: int
    rows: int
    context: int

    def contexts(self, cache_NBKE: Tensor) -> Tensor:
        """(M, K, C, E)."""
        _, block_tokens, heads, features = cache_NBKE.shape
        block, token = block_tokens * heads * features, heads * features
        size, strides = (self.rows, heads, self.context, features), (self.stride * block, features, token, 1)
        return cache_NBKE.as_strided(size, strides, cache_NBKE.storage_offset() + self.first * block)


@dataclass(frozen=True, slots=True)
class Gathered:
    """Places whose blocks lie anywhere: their contexts are a copy. blocks_MN: the blocks of each in order."""

    blocks_MN: Tensor
    context: int

    def contexts(self, cache_NBKE: Tensor) -> Tensor:
        """(M, K, C, E)."""
        found = cache_NBKE.index_select(0, self.blocks_MN.reshape(-1))
        found_MCKE = found.view(self.blocks_MN.shape[0], -1, *cache_NBKE.shape[2:])
        return found_MCKE[:, : self.context].transpose(1, 2)


class PlaceGroup:
    """Places that attend in one call.

    A place with fewer new tokens than its group repeats its last one as a query; the repeats' outputs are not read.
    """

    def __init__(
        self, read: Strided | Gathered, past: np.ndarray, new: np.ndarray, starts: np.ndarray, device: torch.device
    ) -> None:
        step_MQ = np.minimum(np.arange(int(new.max()))[None], new[:, None] - 1)
        last_MQ = past[:, None] + step_MQ
        self.read = read
        self._query_MQ = torch.from_numpy(starts[:, None] + step_MQ).to(device)
        self._last_MQ = torch.from_numpy(last_MQ).to(device)
        self._sees_all = bool((last_MQ == read.context - 1).all())
        self._masks: dict[int, Tensor | None] = {}

    def queries(self, q_THE: Tensor) -> Tensor:
        """(M, H, Q, E)."""
        rows = q_THE.index_select(0, self._query_MQ.reshape(-1)).view(*self._query_MQ.shape, *q_THE.shape[1:])
        return rows.transpose(1, 2)

    def mask(self, window: int) -> Tensor | None:
        """(M, 1, Q, C) bool, which contexts a query sees; None when each sees all. Made once for all layers."""
        if window not in self._masks:
            self._masks[window] = self._make_mask(window)
        return self._masks[window]

    def _make_mask(self, window: int) -> Tensor | None:
        windowed = 0 < window < self.read.context
        if self._sees_all and not windowed:
            return None
        context_C = torch.arange(self.read.context, device=self._last_MQ.device)
        mask_MQC = context_C <= self._last_MQ[..., None]
        if windowed:
            mask_MQC &= context_C > self._last_MQ[..., None] - window
        return mask_MQC[:, None]


def alike_groups(places: tuple[int, ...], new_tokens: tuple[int, ...]) -> list[list[int]]:
    """Indices of the pass's rows in groups of like numbers of new tokens; within a group in the order of places."""
    groups: list[list[int]] = []
    for i in sorted(range(len(places)), key=lambda i: -new_tokens[i]):
        longest = new_tokens[groups[-1][0]] if groups else 0
        fewest = min(longest - _GROUP_SLACK_TOKENS, math.ceil(_GROUP_SHARE * longest))
        alike = new_tokens[i] == longest or new_tokens[i] >= max(fewest, 2)
        if groups and alike:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [sorted(group, key=lambda i: places[i]) for group in groups]


def strided_runs(firsts: Mapping[int, int]) -> list[list[int]]:
    """The rows in runs whose first blocks lie at equal distances, in the order of their first blocks."""
    runs: list[list[int]] = []
    for i in sorted(firsts, key=firsts.__getitem__):
        last = runs[-1] if runs else []
        if last and (len(last) < 2 or firsts[i] - firsts[last[-1]] == firsts[last[-1]] - firsts[last[-2]]):
            last.append(i)
        else:
            runs.append([i])
    return runs


def restore_order(
    members: list[np.ndarray], new: np.ndarray, starts: np.ndarray, device: torch.device
) -> Tensor | None:
    """For each token of the stream its place in the groups' outputs laid end to end; None when that is the order."""
    restore_T = np.empty(int(new.sum()), dtype=np.int64)
    at = 0
    for group in members:
        width = int(new[group].max())
        for m, i in enumerate(group):
            first, count = int(starts[i]), int(new[i])
            restore_T[first : first + count] = at + m * width + np.arange(count)
        at += width * len(group)
    if at == len(restore_T) and np.array_equal(restore_T, np.arange(at)):
        return None
    return torch.from_numpy(restore_T).to(device)
