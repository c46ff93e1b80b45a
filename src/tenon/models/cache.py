"""The key/value cache: what generation remembers of the tokens it has seen.

Rows of the cache are numbered places; a place holds one sequence from its first token on. One forward pass may mix
places that are being filled (many new tokens) with places that grow by one token.

Shape legend: N places, L longest sequence, K key/value heads, H query heads, E head dimension, T tokens of a pass,
M places in a pass, Q new tokens of the longest of them, C its context. This module knows no sampling and no adapters.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tenon.bases.facts import ModelFacts


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
        """Forget a place but for its first tokens (a prefix that the next sequence shares)."""
        self.lengths[place] = min(self.lengths[place], keep_tokens)

    def move(self, source: int, target: int) -> None:
        """Let `target` hold what `source` holds; `source` is then free."""
        length = self.lengths[source]
        self.keys[:, target, :length] = self.keys[:, source, :length]
        self.values[:, target, :length] = self.values[:, source, :length]
        self.lengths[target], self.lengths[source] = length, 0

    def extend(self, places: tuple[int, ...], new_tokens: tuple[int, ...]) -> CachedAttention:
        """Attention of one pass that appends new_tokens[i] tokens to places[i]; call `commit` on it afterwards."""
        return CachedAttention(self, places, new_tokens)


class CachedAttention:
    """Attention of one forward pass over a cache (an `Attention`); the pass's tokens are packed place by place."""

    def __init__(self, cache: KvCache, places: tuple[int, ...], new_tokens: tuple[int, ...]) -> None:
        device = cache.keys.device
        past = [cache.lengths[p] for p in places]
        self._cache, self._places, self._new = cache, places, new_tokens
        self._context = max(p + n for p, n in zip(past, new_tokens, strict=True))
        self._place_T = torch.tensor(
            [p for p, n in zip(places, new_tokens, strict=True) for _ in range(n)], device=device
        )
        positions = [p + i for p, n in zip(past, new_tokens, strict=True) for i in range(n)]
        self.positions_T = torch.tensor(positions, device=device)
        self._place_M = torch.tensor(places, device=device)
        queries = max(new_tokens)
        starts = torch.tensor([sum(new_tokens[:i]) for i in range(len(new_tokens))], device=device)[:, None]
        counts = torch.tensor(new_tokens, device=device)[:, None]
        step_Q = torch.arange(queries, device=device)
        # Shorter places repeat their last new token as a query; the repeats' outputs are not read.
        self._query_MQ = starts + torch.minimum(step_Q[None], counts - 1)
        self._last_MQ = torch.tensor(past, device=device)[:, None] + torch.minimum(step_Q[None], counts - 1)
        self._restore_T = torch.tensor(
            [m * queries + i for m, n in enumerate(new_tokens) for i in range(n)], device=device
        )

    def attend(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, *, scale: float, window: int) -> Tensor:
        """Write the new keys and values, then attend each new token to its place's past and itself."""
        keys_NLKE, values_NLKE = self._cache.keys[layer], self._cache.values[layer]
        keys_NLKE[self._place_T, self.positions_T] = k_TKE
        values_NLKE[self._place_T, self.positions_T] = v_TKE
        context_C = torch.arange(self._context, device=q_THE.device)
        mask_MQC = context_C <= self._last_MQ[..., None]
        if window > 0:
            mask_MQC = mask_MQC & (context_C > self._last_MQ[..., None] - window)
        out_MHQE = functional.scaled_dot_product_attention(
            q_THE[self._query_MQ].transpose(1, 2),
            self._contexts(keys_NLKE),
            self._contexts(values_NLKE),
            attn_mask=mask_MQC[:, None],
            scale=scale,
            enable_gqa=q_THE.shape[1] != k_TKE.shape[1],
        )
        return out_MHQE.transpose(1, 2).reshape(-1, *q_THE.shape[1:])[self._restore_T]

    def _contexts(self, cache_NLKE: Tensor) -> Tensor:
        """(M, K, C, E): a view when the places are the first ones in order, a copy otherwise."""
        if self._places == tuple(range(len(self._places))):
            rows = cache_NLKE[: len(self._places), : self._context]
        else:
            rows = cache_NLKE[self._place_M, : self._context]
        return rows.transpose(1, 2)

    def commit(self) -> None:
        """Count the pass's tokens as seen; call once, after the forward pass."""
        for place, new in zip(self._places, self._new, strict=True):
            self._cache.lengths[place] += new
