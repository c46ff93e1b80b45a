"""From the stacked projection to attention's heads: low-rank term, query/key norm, rotary position embedding.

    y = x * cos + rotate_half(x) * sin,   rotate_half([a, b]) = [-b, a]

The transposed rotation is the same with -sin. cos and sin may be scaled (YaRN's attention factor): the transposed map
keeps the scale. Source: Su et al., 2021 (RoFormer), half-split layout; the norm of queries and keys is Qwen 3's.
Shape legend: T tokens, H query heads, K key/value heads, X any of them, E head dimension, O = (H + 2 K) E.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tenon.kernels import rotary_triton as fused
from tenon.kernels.low_rank import LowRank, Sum, room
from tenon.kernels.rms_norm import rms_norm, rms_norm_backward
from tenon.kernels.threads import ROTARY_ELEMENT, threads_for


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Query heads, key/value heads, their dimension; and the gains of their norms with its eps, where there are any."""

    heads: int
    kv_heads: int
    size: int
    q_norm_E: Tensor | None = None
    k_norm_E: Tensor | None = None
    eps: float = 0.0


@dataclass(frozen=True, slots=True)
class Rotation:
    """cos and sin (T, E) in the compute dtype, each repeating its two halves."""

    cos_TE: Tensor
    sin_TE: Tensor


@dataclass(slots=True)
class Heads:
    """What attention takes. raw_TO: the projection before the norms, where there are norms (their backward needs
    it).
    """

    q_THE: Tensor
    k_TKE: Tensor
    v_TKE: Tensor
    raw_TO: Tensor | None = None


def rotary_reference(x_TXE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """The formula in plain torch."""
    first, second = x_TXE.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x_TXE * cos_TE.unsqueeze(1) + rotated * sin_TE.unsqueeze(1)


def rotary(x_TXE: Tensor, rotation: Rotation, *, back: bool = False) -> Tensor:
    """Every head of every token rotated by its position's angles (back: the transposed map); a new tensor."""
    half = x_TXE.shape[-1] // 2
    cos_T1F, sin_T1F = rotation.cos_TE[:, None, :half], rotation.sin_TE[:, None, :half]
    sign = -1.0 if back else 1.0
    first, second = x_TXE.chunk(2, dim=-1)
    out = torch.empty_like(x_TXE, memory_format=torch.contiguous_format)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos_T1F, out=out_first).addcmul_(second, sin_T1F, value=-sign)
    torch.mul(second, cos_T1F, out=out_second).addcmul_(first, sin_T1F, value=sign)
    return out


def make_heads(qkv: Sum, rotation: Rotation | None, shape: HeadShape, *, fuse: bool) -> Heads:
    """The heads of a projection. rotation None: this layer does not rotate. fuse: in one kernel, in place where there
    are no norms.
    """
    if fuse:
        q_TO, raw_TO = fused.make_heads(qkv, rotation, shape)
        return Heads(*_split(q_TO, shape), raw_TO)
    raw_TO = qkv.settled()
    q_THE, k_TKE, v_TKE = _split(raw_TO, shape)
    normed = shape.q_norm_E is not None
    with threads_for(ROTARY_ELEMENT * q_THE.numel()):
        if shape.q_norm_E is not None and shape.k_norm_E is not None:
            q_THE = rms_norm(q_THE, shape.q_norm_E, shape.eps)
            k_TKE = rms_norm(k_TKE, shape.k_norm_E, shape.eps)
        if rotation is not None:
            q_THE, k_TKE = rotary(q_THE, rotation), rotary(k_TKE, rotation)
    return Heads(q_THE, k_TKE, v_TKE, raw_TO if normed else None)


def make_heads_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    heads: Heads,
    rotation: Rotation | None,
    shape: HeadShape,
    *,
    fuse: bool,
    reader: LowRank | None = None,
) -> Tensor:
    """The gradient of the stacked projection (T, O) from those of q, k and v, a new tensor.

    reader: whose low-rank gradients are to have room behind it, where it is fused.
    """
    dq_THE, dk_TKE, dv_TKE = grads
    if fuse:
        d_qkv_TO = room(dq_THE, (shape.heads + 2 * shape.kv_heads) * shape.size, reader)
        fused.make_heads_backward(grads, heads.raw_TO, rotation, shape, d_qkv_TO)
        return d_qkv_TO
    with threads_for(ROTARY_ELEMENT * dq_THE.numel()):
        if rotation is not None:
            dq_THE, dk_TKE = rotary(dq_THE, rotation, back=True), rotary(dk_TKE, rotation, back=True)
        if shape.q_norm_E is not None and shape.k_norm_E is not None and heads.raw_TO is not None:
            q_THE, k_TKE, _ = _split(heads.raw_TO, shape)
            dq_THE = rms_norm_backward(dq_THE, q_THE, shape.q_norm_E, shape.eps)
            dk_TKE = rms_norm_backward(dk_TKE, k_TKE, shape.k_norm_E, shape.eps)
        return torch.cat([dq_THE.flatten(1), dk_TKE.flatten(1), dv_TKE.flatten(1)], dim=1)


def _split(qkv_TO: Tensor, shape: HeadShape) -> tuple[Tensor, Tensor, Tensor]:
    heads_TXE = qkv_TO.view(qkv_TO.shape[0], -1, shape.size)
    q_THE, k_TKE, v_TKE = heads_TXE.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
    return q_THE, k_TKE, v_TKE
