"""The key/value cache: what generation remembers of the tokens it has seen.

Rows of the cache are numbered places; a place holds one sequence from its first token on. One forward pass may mix
places that are being filled (many new tokens) with places that grow by one token.

Shape legend: N places, L longest sequence, K key/value heads, H query heads, E head dimension, T tokens of a pass,
M places in a pass, Q new tokens of the longest of them, C its context. This module knows no sampling and no adapters.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from tenon.bases.facts import ModelFacts
from tenon.models.attention import fused_attention

# Places attend together while the one with fewer new tokens has at least this share of the other's, or lacks at most
# so many of them.
_GROUP_SHARE = 0.75
_GROUP_SLACK_TOKENS = 8


class KvCache:
    """Keys and values of every layer for a fixed number of places, allocated once."""

    def __init__(
        self, facts: ModelFacts, *, places: int, tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """tokens: the longest sequence of a place, prompt and answer together."""
        shape = (facts.layers, places, tokens, facts.kv_heads, facts.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * places

    @property
    def capacity_tokens(self) -> int:
        """The longest sequence that a place can hold."""
        return self.keys.shape[2]

    def clear(self, place: int, keep_tokens: int = 0) -> None:
        """Forget a place but for its first tokens (a prefix that the next sequence shares).

        What is forgotten becomes zero: a masked NaN of one sequence would still spoil the next one's attention.
        """
        length = self.lengths[place]
        if keep_tokens < length:
            self.keys[:, place, keep_tokens:length] = 0
            self.values[:, place, keep_tokens:length] = 0
        self.lengths[place] = min(length, keep_tokens)

    def move(self, source: int, target: int) -> None:
        """Let `target` hold what `source` holds; `source` is then free."""
        length = self.lengths[source]
        self.clear(target)
        self.keys[:, target, :length] = self.keys[:, source, :length]
        self.values[:, target, :length] = self.values[:, source, :length]
        self.lengths[target] = length
        self.clear(source)

    def prefix(self, place: int) -> tuple[Tensor, Tensor]:
        """A copy of what a place holds: keys and values (layers, length, K, E), for `restore`."""
        length = self.lengths[place]
        return self.keys[:, place, :length].clone(), self.values[:, place, :length].clone()

    def restore(self, place: int, prefix: tuple[Tensor, Tensor]) -> None:
        """Let a place begin with what `prefix` copied; whatever it held is forgotten."""
        length = prefix[0].shape[1]
        self.clear(place)
        self.keys[:, place, :length], self.values[:, place, :length] = prefix
        self.lengths[place] = length

    def extend(self, places: tuple[int, ...], new_tokens: tuple[int, ...]) -> CachedAttention:
        """Attention of one pass that appends new_tokens[i] tokens to places[i]; call `commit` on it afterwards."""
        return CachedAttention(self, places, new_tokens)


class CachedAttention:
    """Attention of one forward pass over a cache (an `Attention`); the pass's tokens are packed place by place.

    Places attend in groups of like numbers of new tokens: those that grow by one token together, the others apart, so
    that a long prompt does not stretch the queries of a hundred places that only decode.
    """

    def __init__(self, cache: KvCache, places: tuple[int, ...], new_tokens: tuple[int, ...]) -> None:
        device = cache.keys.device
        past = np.array([cache.lengths[p] for p in places], dtype=np.int64)
        new = np.array(new_tokens, dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(new)[:-1]])
        step_T = np.arange(int(new.sum())) - np.repeat(starts, new)
        self._cache, self._places, self._new = cache, places, new_tokens
        self.positions_T = torch.from_numpy(np.repeat(past, new) + step_T).to(device)
        self._place_T = torch.from_numpy(np.repeat(np.array(places, dtype=np.int64), new)).to(device)
        members = [np.array(group, dtype=np.int64) for group in _group_by_new_tokens(places, new_tokens)]
        self._groups = [_PlaceGroup(np.array(places)[m], past[m], new[m], starts[m], device) for m in members]
        self._restore_T = _restore_order(members, new, starts, device)

    def attend(
        self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, *, scale: float, window: int, record: bool
    ) -> tuple[Tensor, None]:
        """Write the new keys and values, then attend each new token to its place's past and itself.

        Raises ValueError when it is to be recorded: a cache is for inference.
        """
        if record:
            raise ValueError("attention over a cache has no backward pass")
        keys_NLKE, values_NLKE = self._cache.keys[layer], self._cache.values[layer]
        keys_NLKE[self._place_T, self.positions_T] = k_TKE
        values_NLKE[self._place_T, self.positions_T] = v_TKE
        outputs = [
            fused_attention(
                group.queries(q_THE),
                group.contexts(keys_NLKE),
                group.contexts(values_NLKE),
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
        for place, new in zip(self._places, self._new, strict=True):
            self._cache.lengths[place] += new


class _PlaceGroup:
    """Places that attend in one call: M places, Q queries, C contexts.

    A place with fewer new tokens than its group repeats its last one as a query; the repeats' outputs are not read.
    """

    def __init__(
        self, places: np.ndarray, past: np.ndarray, new: np.ndarray, starts: np.ndarray, device: torch.device
    ) -> None:
        step_MQ = np.minimum(np.arange(int(new.max()))[None], new[:, None] - 1)
        last_MQ = past[:, None] + step_MQ
        self._query_MQ = torch.from_numpy(starts[:, None] + step_MQ).to(device)
        self._last_MQ = torch.from_numpy(last_MQ).to(device)
        self._context = int(last_MQ.max()) + 1
        self._sees_all = bool((last_MQ == self._context - 1).all())
        first, count = int(places[0]), len(places)
        in_order = np.array_equal(places, np.arange(first, first + count))
        self._range = slice(first, first + count) if in_order else None
        self._place_M = torch.from_numpy(places.astype(np.int64)).to(device)
        self._masks: dict[int, Tensor | None] = {}

    def queries(self, q_THE: Tensor) -> Tensor:
        """(M, H, Q, E)."""
        rows = q_THE.index_select(0, self._query_MQ.reshape(-1)).view(*self._query_MQ.shape, *q_THE.shape[1:])
        return rows.transpose(1, 2)

    def contexts(self, cache_NLKE: Tensor) -> Tensor:
        """(M, K, C, E): a view when the places are neighbours in order, a copy otherwise."""
        if self._range is not None:
            return cache_NLKE[self._range, : self._context].transpose(1, 2)
        return cache_NLKE[self._place_M, : self._context].transpose(1, 2)

    def mask(self, window: int) -> Tensor | None:
        """(M, 1, Q, C) bool, which contexts a query sees; None when each sees all. Made once for all layers."""
        if window not in self._masks:
            self._masks[window] = self._make_mask(window)
        return self._masks[window]

    def _make_mask(self, window: int) -> Tensor | None:
        windowed = 0 < window < self._context
        if self._sees_all and not windowed:
            return None
        context_C = torch.arange(self._context, device=self._last_MQ.device)
        mask_MQC = context_C <= self._last_MQ[..., None]
        if windowed:
            mask_MQC &= context_C > self._last_MQ[..., None] - window
        return mask_MQC[:, None]


def _group_by_new_tokens(places: tuple[int, ...], new_tokens: tuple[int, ...]) -> list[list[int]]:
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


def _restore_order(
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
