"""Causal attention over packed rows: a token sees its own row's earlier tokens (and its shared prefix), nothing else.

A pass that is recorded comes with an `AttentionTape`, which gives the gradients of queries, keys and values.

Shape legend: T tokens, H query heads, K key/value heads, E head dimension, G rows of a group, Q queries and C contexts
of a row, N cache rows. This module knows no weights.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from tenon.batch import AttentionGroup, AttentionLayout
from tenon.kernels.threads import threads_for
from tenon.models.flash import RowAttention, fixed_order


class AttentionTape(Protocol):
    """What a recorded attention left behind."""

    def backward(self, d_out_THE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, k and v; call once."""
        ...


class Attention(Protocol):
    """What the decoder asks of attention: which earlier tokens each query sees is this object's business."""

    def attend(
        self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, *, scale: float, window: int, record: bool
    ) -> tuple[Tensor, AttentionTape | None]:
        """The attended values (T, H, E), and the tape when it is recorded."""
        ...


class PackedAttention:
    """Attention within the rows of a batch, with no cache: training, and scoring."""

    def __init__(self, layout: AttentionLayout, *, room_bytes: int = 0) -> None:
        """room_bytes: what a backward pass on a GPU may take beside its results, if that is more than it needs."""
        self._layout = layout
        self._packed = None if layout.packed is None else RowAttention(layout.packed, room_bytes)

    @property
    def problem(self) -> str:
        """See `RowAttention`."""
        return "" if self._packed is None else self._packed.problem

    def attend(
        self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, *, scale: float, window: int, record: bool
    ) -> tuple[Tensor, AttentionTape | None]:
        """See `Attention.attend`; the same for every layer."""
        del layer
        if self._packed is not None:
            return self._packed.attend(q_THE, k_TKE, v_TKE, scale=scale, window=window, record=record)
        if not record:
            return packed_attention(q_THE, k_TKE, v_TKE, self._layout, scale=scale, window=window), None
        return self._recorded(q_THE, k_TKE, v_TKE, scale=scale, window=window)

    def _recorded(
        self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, *, scale: float, window: int
    ) -> tuple[Tensor, AttentionTape]:
        q_THE, k_TKE, v_TKE = (x.detach().requires_grad_() for x in (q_THE, k_TKE, v_TKE))
        with torch.enable_grad():
            out_THE = packed_attention(q_THE, k_TKE, v_TKE, self._layout, scale=scale, window=window)
        return out_THE.detach(), GraphTape((q_THE, k_TKE, v_TKE), out_THE)


class GraphTape:
    """The tape of an attention that torch differentiates by itself: a graph of this one operation."""

    def __init__(self, inputs: tuple[Tensor, Tensor, Tensor], out_THE: Tensor) -> None:
        self._inputs, self._out_THE = inputs, out_THE

    def backward(self, d_out_THE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `AttentionTape.backward`."""
        with fixed_order() if d_out_THE.is_cuda else nullcontext():
            dq, dk, dv = torch.autograd.grad(self._out_THE, self._inputs, d_out_THE)
        return dq, dk, dv


def packed_attention(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, layout: AttentionLayout, *, scale: float, window: int
) -> Tensor:
    """Causal attention per row. window > 0: a query sees at most so many tokens, itself included.

    Rows of like length are attended together by torch's fused kernel; what they are padded with is never seen (see
    `AttentionGroup`).
    """
    outputs = [_attend_group(q_THE, k_TKE, v_TKE, group, scale=scale, window=window) for group in layout.groups]
    stream = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return stream if layout.restore_T is None else stream.index_select(0, layout.restore_T)


def _attend_group(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, group: AttentionGroup, *, scale: float, window: int
) -> Tensor:
    """The output of one group, (G Q, H, E), its repeats included."""
    q_GHQE = _rows(q_THE, group.query_GQ, group)
    k_GKCE = _rows(k_TKE, group.context_GC, group)
    v_GKCE = _rows(v_TKE, group.context_GC, group)
    queries, contexts = q_GHQE.shape[2], k_GKCE.shape[2]
    masked = group.offset > 0 or 0 < window < contexts
    mask_QC = causal_mask(queries, contexts, group.offset, window, q_THE.device) if masked else None
    out_GHQE = fused_attention(q_GHQE, k_GKCE, v_GKCE, mask_QC, scale=scale, causal=not masked)
    return out_GHQE.transpose(1, 2).reshape(-1, *q_THE.shape[1:])


def fused_attention(
    q_GHQE: Tensor, k_GKCE: Tensor, v_GKCE: Tensor, mask: Tensor | None, *, scale: float, causal: bool = False
) -> Tensor:
    """torch's fused attention (G, H, Q, E).

    mask: True where a query sees a context; None: it sees all, or when causal those up to its own place.
    """
    # Scores and sums, each about twice as slow as a plain product of so many multiplications.
    with threads_for(4 * q_GHQE.numel() * k_GKCE.shape[2]):
        return _fused_attention(q_GHQE, k_GKCE, v_GKCE, mask, scale=scale, causal=causal)


def _fused_attention(
    q_GHQE: Tensor, k_GKCE: Tensor, v_GKCE: Tensor, mask: Tensor | None, *, scale: float, causal: bool
) -> Tensor:
    grouped = q_GHQE.shape[1] != k_GKCE.shape[1]
    if grouped and q_GHQE.shape[2] == 1 and not causal and not q_GHQE.is_cuda:
        # The heads that share keys attend as if they were neighbouring queries: keys are read once for all of them.
        q_GKHE = q_GHQE.reshape(q_GHQE.shape[0], k_GKCE.shape[1], -1, q_GHQE.shape[3])
        out_GKHE = functional.scaled_dot_product_attention(q_GKHE, k_GKCE, v_GKCE, attn_mask=mask, scale=scale)
        return out_GKHE.reshape(q_GHQE.shape)
    if grouped and mask is not None and q_GHQE.is_cuda:
        # No fused CUDA kernel takes a mask and grouped heads at once; repeated heads keep off the unfused one.
        heads = q_GHQE.shape[1] // k_GKCE.shape[1]
        k_GKCE, v_GKCE = k_GKCE.repeat_interleave(heads, dim=1), v_GKCE.repeat_interleave(heads, dim=1)
        grouped = False
    return functional.scaled_dot_product_attention(
        q_GHQE, k_GKCE, v_GKCE, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _rows(x_THE: Tensor, index_GL: Tensor | None, group: AttentionGroup) -> Tensor:
    """(G, heads, L, E) of the group's rows."""
    if index_GL is None:
        x = x_THE[group.start : group.stop].view(group.rows, -1, *x_THE.shape[1:])
    else:
        x = x_THE.index_select(0, index_GL.reshape(-1)).view(*index_GL.shape, *x_THE.shape[1:])
    return x.transpose(1, 2)


def causal_mask(queries: int, contexts: int, offset: int, window: int, device: torch.device) -> Tensor:
    """(Q, C) bool: query i sees context j when j <= offset + i and, with a window, j > offset + i - window."""
    last_Q1 = torch.arange(offset, offset + queries, device=device)[:, None]
    context_C = torch.arange(contexts, device=device)
    mask_QC = context_C <= last_Q1
    return mask_QC & (context_C > last_Q1 - window) if window > 0 else mask_QC
