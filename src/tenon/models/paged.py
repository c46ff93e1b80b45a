"""Attention of a pass over the cache on a GPU: kernels read the pages where they lie.

Shape legend: T tokens of a pass, R rows, M pages of a row, N all pages, B tokens of a page, H query heads, K key/value
heads, E head dimension. This module knows no pool of blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tenon.kernels.paged_attention import Pages, attend, list_queries, write


class PagedCache(Protocol):
    """What is read of a cache. keys, values: (layers, N, B, K, E). pages_PM: int32, the pages of each place."""

    keys: Tensor
    values: Tensor
    lengths: list[int]
    pages_PM: np.ndarray
    block_tokens: int

    def commit(self, places: Sequence[int], new_tokens: Sequence[int]) -> None:
        """Count a pass's tokens as seen."""
        ...


class PagedAttention:
    """Attention over a cache whose pages are known (an `Attention`)."""

    def __init__(self, cache: PagedCache, pages: Pages) -> None:
        self._cache, self._pages = cache, pages

    def attend(
        self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, *, scale: float, window: int, record: bool
    ) -> tuple[Tensor, None]:
        """Write the new keys and values, then attend each new token to its place's past and itself.

        Raises ValueError when it is to be recorded: a cache is for inference.
        """
        if record:
            raise ValueError("attention over a cache has no backward pass")
        keys_NBKE, values_NBKE = self._cache.keys[layer], self._cache.values[layer]
        write(k_TKE, v_TKE, keys_NBKE, values_NBKE, self._pages)
        return attend(q_THE, keys_NBKE, values_NBKE, self._pages, scale=scale, window=window), None


class PagedPass(PagedAttention):
    """The same for one pass; its tokens are packed place by place."""

    def __init__(self, cache: PagedCache, places: tuple[int, ...], new_tokens: tuple[int, ...]) -> None:
        past = np.array([cache.lengths[place] for place in places], dtype=np.int32)
        new = np.array(new_tokens, dtype=np.int32)
        row_T = np.repeat(np.arange(len(places), dtype=np.int32), new)
        starts = np.concatenate([[0], np.cumsum(new)[:-1]]).astype(np.int32)
        position_T = np.arange(len(row_T), dtype=np.int32) - starts[row_T] + past[row_T]
        width = -(-int((past + new).max()) // cache.block_tokens)
        table_RM = cache.pages_PM[list(places), :width]
        ones, blocks = list_queries(new_tokens)
        pages = _upload([table_RM, row_T, position_T, ones, blocks], cache.keys.device)
        super().__init__(cache, Pages(*pages))
        self._places, self._new = places, new_tokens
        self.positions_T = pages[2]

    def commit(self) -> None:
        """Count the pass's tokens as seen; call once, after the forward pass."""
        self._cache.commit(self._places, self._new)


def _upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """int32 tensors of arrays of any shape, by one copy to the device; each begins at a multiple of 16 bytes."""
    sizes = [-(-array.size // 4) * 4 for array in arrays]
    starts = np.cumsum([0, *sizes])
    whole = torch.empty(int(starts[-1]), dtype=torch.int32, pin_memory=device.type == "cuda")
    filled = whole.numpy()
    for array, start in zip(arrays, starts, strict=False):
        filled[start : start + array.size] = array.reshape(-1)
    there = whole.to(device, non_blocking=True)
    return [there[start : start + array.size].view(array.shape) for array, start in zip(arrays, starts, strict=False)]
