"""The Triton kernels of `rotary`: one head of a block of tokens a program. Shape legend as in `rotary`; half of a head
is padded to a power of two.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tenon.kernels import rotary_few_triton as few
from tenon.kernels.blocks_triton import TILE, block_rows, member_block, padded_rank, site_at
from tenon.kernels.gpu import ceil_div, jit, power_of_two, tl
from tenon.kernels.low_rank import Addend, Sum
from tenon.kernels.low_rank_classes import classes

if TYPE_CHECKING:
    from tenon.kernels.rotary import HeadShape, Rotation


@jit
def _make_heads_kernel(
    qkv_ptr,
    qkv_stride,
    out_ptr,
    out_stride,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    low_ptr,
    low_stride,
    tiles_ptr,
    table_ptr,
    tokens,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    ROUTED: tl.constexpr,
    ROTATE: tl.constexpr,
    NORM: tl.constexpr,
):
    slot, rows, row_mask = block_rows(tiles_ptr, tokens, ROWS, ROUTED)
    head = tl.program_id(1)
    member = tl.where(head < HEADS, 0, tl.where(head < HEADS + KV_HEADS, 1, 2))
    first_head = tl.where(member == 0, 0, tl.where(member == 1, HEADS, HEADS + KV_HEADS))
    e = tl.arange(0, HALF)
    inside = e < SIZE // 2
    mask = row_mask[:, None] & inside[None, :]
    at = rows[:, None] * qkv_stride + head * SIZE + e[None, :]
    first = tl.load(qkv_ptr + at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(qkv_ptr + at + SIZE // 2, mask=mask, other=0.0).to(tl.float32)
    element = qkv_ptr.dtype.element_ty
    if ROUTED:
        if slot >= 0:
            site = site_at(table_ptr, slot)
            o = (head - first_head) * SIZE + e
            first += member_block(low_ptr, low_stride, rows, row_mask, site, member, o, inside, RANK)
            second += member_block(low_ptr, low_stride, rows, row_mask, site, member, o + SIZE // 2, inside, RANK)
        first, second = first.to(element).to(tl.float32), second.to(element).to(tl.float32)
    if NORM:
        if ROUTED:
            tl.store(qkv_ptr + at, first.to(element), mask=mask)
            tl.store(qkv_ptr + at + SIZE // 2, second.to(element), mask=mask)
        if member < 2:
            norm_ptr = tl.where(member == 0, q_norm_ptr, k_norm_ptr)
            inverse = 1.0 / tl.sqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / SIZE + eps)
            gain_1 = tl.load(norm_ptr + e, mask=inside, other=0.0).to(tl.float32)
            gain_2 = tl.load(norm_ptr + e + SIZE // 2, mask=inside, other=0.0).to(tl.float32)
            first = (first * inverse[:, None]).to(element).to(tl.float32) * gain_1[None, :]
            second = (second * inverse[:, None]).to(element).to(tl.float32) * gain_2[None, :]
    if ROTATE:
        if member < 2:
            turn = rows[:, None] * SIZE + e[None, :]
            cos = tl.load(cos_ptr + turn, mask=mask, other=0.0).to(tl.float32)
            sin = tl.load(sin_ptr + turn, mask=mask, other=0.0).to(tl.float32)
            turned = first * cos - second * sin
            second = second * cos + first * sin
            first = turned
    at = rows[:, None] * out_stride + head * SIZE + e[None, :]
    tl.store(out_ptr + at, first.to(element), mask=mask)
    tl.store(out_ptr + at + SIZE // 2, second.to(element), mask=mask)


@jit
def _make_heads_backward_kernel(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    q_step,
    k_step,
    v_step,
    q_head_step,
    k_head_step,
    v_head_step,
    raw_ptr,
    out_ptr,
    out_stride,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    tokens,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    ROTATE: tl.constexpr,
    NORM: tl.constexpr,
):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row_mask = rows < tokens
    head = tl.program_id(1)
    e = tl.arange(0, HALF)
    inside = e < SIZE // 2
    mask = row_mask[:, None] & inside[None, :]
    if head < HEADS:
        source = dq_ptr + rows[:, None] * q_step + head * q_head_step + e[None, :]
        norm_ptr = q_norm_ptr
    elif head < HEADS + KV_HEADS:
        source = dk_ptr + rows[:, None] * k_step + (head - HEADS) * k_head_step + e[None, :]
        norm_ptr = k_norm_ptr
    else:
        source = dv_ptr + rows[:, None] * v_step + (head - HEADS - KV_HEADS) * v_head_step + e[None, :]
        norm_ptr = k_norm_ptr
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + SIZE // 2, mask=mask, other=0.0).to(tl.float32)
    at = rows[:, None] * ((HEADS + 2 * KV_HEADS) * SIZE) + head * SIZE + e[None, :]
    if head < HEADS + KV_HEADS:
        if ROTATE:
            turn = rows[:, None] * SIZE + e[None, :]
            cos = tl.load(cos_ptr + turn, mask=mask, other=0.0).to(tl.float32)
            sin = tl.load(sin_ptr + turn, mask=mask, other=0.0).to(tl.float32)
            turned = first * cos + second * sin
            second = second * cos - first * sin
            first = turned
        if NORM:
            x_1 = tl.load(raw_ptr + at, mask=mask, other=0.0).to(tl.float32)
            x_2 = tl.load(raw_ptr + at + SIZE // 2, mask=mask, other=0.0).to(tl.float32)
            inverse = 1.0 / tl.sqrt((tl.sum(x_1 * x_1, 1) + tl.sum(x_2 * x_2, 1)) / SIZE + eps)
            first = first * tl.load(norm_ptr + e, mask=inside, other=0.0).to(tl.float32)[None, :]
            second = second * tl.load(norm_ptr + e + SIZE // 2, mask=inside, other=0.0).to(tl.float32)[None, :]
            pull = (tl.sum(first * x_1, 1) + tl.sum(second * x_2, 1)) / SIZE * inverse * inverse
            first = inverse[:, None] * (first - x_1 * pull[:, None])
            second = inverse[:, None] * (second - x_2 * pull[:, None])
    element = out_ptr.dtype.element_ty
    target = out_ptr + rows[:, None] * out_stride + head * SIZE + e[None, :]
    tl.store(target, first.to(element), mask=mask)
    tl.store(target + SIZE // 2, second.to(element), mask=mask)


_ROWS = 32


def make_heads(qkv: Sum, rotation: Rotation | None, shape: HeadShape) -> tuple[Tensor, Tensor | None]:
    """(T, O) with norms and rotation done, and the tensor before the norms where there are any."""
    qkv_TO, addend = qkv.y_TO, qkv.addend
    normed = shape.q_norm_E is not None
    out_TO = torch.empty_like(qkv_TO) if normed else qkv_TO
    if addend is not None and addend.low.few is not None:
        _make_few_heads(qkv_TO, out_TO, rotation, shape, addend)
        qkv.addend = None
        return out_TO, qkv_TO if normed else None
    for low in (None,) if addend is None else classes(addend.low, stacked=False):
        mine = None if addend is None or low is None else replace(addend, low=low)
        _make_heads(Sum(qkv_TO, mine), out_TO, rotation, shape)
    qkv.addend = None
    return out_TO, qkv_TO if normed else None


def _make_few_heads(
    qkv_TO: Tensor, out_TO: Tensor, rotation: Rotation | None, shape: HeadShape, addend: Addend
) -> None:
    turn = None if rotation is None else (rotation.cos_TE, rotation.sin_TE)
    gains = None if shape.q_norm_E is None or shape.k_norm_E is None else (shape.q_norm_E, shape.k_norm_E)
    heads = (shape.heads, shape.kv_heads, shape.size)
    few.make_heads(qkv_TO, out_TO, turn, gains, addend, heads=heads, eps=shape.eps)


def _make_heads(qkv: Sum, out_TO: Tensor, rotation: Rotation | None, shape: HeadShape) -> None:
    """Of all tokens, or of those whose slots the term has."""
    qkv_TO, addend = qkv.y_TO, qkv.addend
    routes = None if addend is None else addend.low.routes
    blocks = ceil_div(qkv_TO.shape[0], _ROWS) if routes is None else routes.tiles_N3.shape[0] * (TILE // _ROWS)
    low_TW = qkv_TO if addend is None else addend.low_TW
    _make_heads_kernel[(blocks, shape.heads + 2 * shape.kv_heads)](
        qkv_TO,
        qkv_TO.stride(0),
        out_TO,
        out_TO.stride(0),
        qkv_TO if rotation is None else rotation.cos_TE,
        qkv_TO if rotation is None else rotation.sin_TE,
        qkv_TO if shape.q_norm_E is None else shape.q_norm_E,
        qkv_TO if shape.k_norm_E is None else shape.k_norm_E,
        low_TW,
        low_TW.stride(0),
        qkv_TO if routes is None else routes.tiles_N3,
        qkv_TO if addend is None else addend.low.table_SF,
        qkv_TO.shape[0],
        shape.eps,
        HEADS=shape.heads,
        KV_HEADS=shape.kv_heads,
        SIZE=shape.size,
        HALF=power_of_two(shape.size // 2, least=16),
        ROWS=_ROWS,
        RANK=16 if addend is None else padded_rank(addend.low.rank),
        ROUTED=routes is not None,
        ROTATE=rotation is not None,
        NORM=shape.q_norm_E is not None,
        num_warps=4,
    )


def make_heads_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    raw_TO: Tensor | None,
    rotation: Rotation | None,
    shape: HeadShape,
    out_TO: Tensor,
) -> None:
    """See `rotary.make_heads_backward`; written into out_TO."""
    dq_THE, dk_TKE, dv_TKE = (grad if grad.stride(2) == 1 else grad.contiguous() for grad in grads)
    tokens = dq_THE.shape[0]
    _make_heads_backward_kernel[(ceil_div(tokens, _ROWS), shape.heads + 2 * shape.kv_heads)](
        dq_THE,
        dk_TKE,
        dv_TKE,
        *(grad.stride(0) for grad in (dq_THE, dk_TKE, dv_TKE)),
        *(grad.stride(1) for grad in (dq_THE, dk_TKE, dv_TKE)),
        out_TO if raw_TO is None else raw_TO,
        out_TO,
        out_TO.stride(0),
        out_TO if rotation is None else rotation.cos_TE,
        out_TO if rotation is None else rotation.sin_TE,
        out_TO if shape.q_norm_E is None else shape.q_norm_E,
        out_TO if shape.k_norm_E is None else shape.k_norm_E,
        tokens,
        shape.eps,
        HEADS=shape.heads,
        KV_HEADS=shape.kv_heads,
        SIZE=shape.size,
        HALF=power_of_two(shape.size // 2, least=16),
        ROWS=_ROWS,
        ROTATE=rotation is not None,
        NORM=raw_TO is not None,
        num_warps=4,
    )
