"""Attention over a paged key/value cache: new tokens see their row's past and themselves, wherever the pages lie.

    out[t] = sum over n <= p of softmax_n(scale q[t] k[n]) v[n],    n, p places in the row of t, p that of t

With a window W a token sees the W last places, its own included. Rows that bring one token read their context in parts
that are joined at the end (split-K decoding: Dao et al., "Flash-Decoding", 2023); longer pieces go in blocks of
queries. Pages: Kwon et al., "PagedAttention" (arXiv:2309.06180).

Shape legend: T tokens of a pass, R rows, M pages of the longest row, N all pages, B tokens of a page, H query heads,
K key/value heads, E head dimension. This module knows no sequences, and not who owns which page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tenon.kernels import paged_attention_triton as fused
from tenon.kernels.paged_attention_triton import QUERY_BLOCK


@dataclass(frozen=True, slots=True)
class Pages:
    """Where the tokens of a pass belong, all int32 on the device.

    table_RM: the pages of each row in order; beyond its last, any. row_T, position_T: row and place of each token;
    place -1: a token that fills up a pass, is not written and sees nothing. ones_N: tokens that are their row's only
    ones. blocks_B2: (first token, how many, at most QUERY_BLOCK) of the others, which are neighbours.
    """

    table_RM: Tensor
    row_T: Tensor
    position_T: Tensor
    ones_N: Tensor
    blocks_B2: Tensor


def list_queries(new_tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(ones, blocks) of `Pages` for rows that bring so many tokens each, one row after the other; int32."""
    ones, blocks, start = [], [], 0
    for new in new_tokens:
        if new == 1:
            ones.append(start)
        else:
            blocks += [(start + at, min(QUERY_BLOCK, new - at)) for at in range(0, new, QUERY_BLOCK)]
        start += new
    return np.array(ones, dtype=np.int32), np.array(blocks, dtype=np.int32).reshape(-1, 2)


def write(k_TKE: Tensor, v_TKE: Tensor, keys_NBKE: Tensor, values_NBKE: Tensor, pages: Pages) -> None:
    """Put each token's keys and values into its place. The last two dimensions of k and v are contiguous."""
    fused.write(k_TKE, v_TKE, keys_NBKE, values_NBKE, pages)


def attend(q_THE: Tensor, keys_NBKE: Tensor, values_NBKE: Tensor, pages: Pages, *, scale: float, window: int) -> Tensor:
    """(T, H, E), once the pass's own keys and values are written. window 0: a token sees all before it."""
    out_THE = q_THE.new_empty(q_THE.shape)
    fused.attend(q_THE, keys_NBKE, values_NBKE, pages, out_THE, scale=scale, window=window)
    return out_THE


def attend_reference(
    q_THE: Tensor, keys_NBKE: Tensor, values_NBKE: Tensor, pages: Pages, *, scale: float, window: int
) -> Tensor:
    """The formula in plain torch, token by token, in the dtype of its inputs."""
    out_THE = torch.zeros_like(q_THE)
    repeat, page = q_THE.shape[1] // keys_NBKE.shape[2], keys_NBKE.shape[1]
    for t, (row, position) in enumerate(zip(pages.row_T.tolist(), pages.position_T.tolist(), strict=True)):
        if position < 0:
            continue
        n = torch.arange(max(0, position + 1 - window) if window else 0, position + 1, device=q_THE.device)
        at = pages.table_RM[row].long()[n // page], n % page
        k_CHE = keys_NBKE[at].repeat_interleave(repeat, dim=1)
        v_CHE = values_NBKE[at].repeat_interleave(repeat, dim=1)
        weights_HC = torch.einsum("he,che->hc", q_THE[t] * scale, k_CHE).softmax(dim=-1)
        out_THE[t] = torch.einsum("hc,che->he", weights_HC, v_CHE)
    return out_THE
