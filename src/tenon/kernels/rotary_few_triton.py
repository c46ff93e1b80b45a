"""From the projection to heads, a program having one head of one token of any slot (see `rotary_triton`)."""

# In a kernel, what a flag leaves unbound is never compiled.
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

from torch import Tensor

from tenon.kernels.gpu import jit, power_of_two, tl
from tenon.kernels.low_rank import Addend
from tenon.kernels.low_rank_few_triton import row_term


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
    slot_ptr,
    table_ptr,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    ROTATE: tl.constexpr,
    NORM: tl.constexpr,
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slot_ptr + token)
    member = tl.where(head < HEADS, 0, tl.where(head < HEADS + KV_HEADS, 1, 2))
    first_head = tl.where(member == 0, 0, tl.where(member == 1, HEADS, HEADS + KV_HEADS))
    e = tl.arange(0, HALF)
    inside = e < SIZE // 2
    at = token * qkv_stride + head * SIZE + e
    first = tl.load(qkv_ptr + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(qkv_ptr + at + SIZE // 2, mask=inside, other=0.0).to(tl.float32)
    element = qkv_ptr.dtype.element_ty
    o = (head - first_head) * SIZE + e
    first += row_term(low_ptr, low_stride, token, slot, table_ptr, member, o, inside, 8)
    second += row_term(low_ptr, low_stride, token, slot, table_ptr, member, o + SIZE // 2, inside, 8)
    first, second = first.to(element).to(tl.float32), second.to(element).to(tl.float32)
    if NORM:
        tl.store(qkv_ptr + at, first.to(element), mask=inside)
        tl.store(qkv_ptr + at + SIZE // 2, second.to(element), mask=inside)
        if member < 2:
            norm_ptr = tl.where(member == 0, q_norm_ptr, k_norm_ptr)
            inverse = 1.0 / tl.sqrt((tl.sum(first * first, 0) + tl.sum(second * second, 0)) / SIZE + eps)
            gain_1 = tl.load(norm_ptr + e, mask=inside, other=0.0).to(tl.float32)
            gain_2 = tl.load(norm_ptr + e + SIZE // 2, mask=inside, other=0.0).to(tl.float32)
            first = (first * inverse).to(element).to(tl.float32) * gain_1
            second = (second * inverse).to(element).to(tl.float32) * gain_2
    if ROTATE:
        if member < 2:
            cos = tl.load(cos_ptr + token * SIZE + e, mask=inside, other=0.0).to(tl.float32)
            sin = tl.load(sin_ptr + token * SIZE + e, mask=inside, other=0.0).to(tl.float32)
            turned = first * cos - second * sin
            second = second * cos + first * sin
            first = turned
    at = token * out_stride + head * SIZE + e
    tl.store(out_ptr + at, first.to(element), mask=inside)
    tl.store(out_ptr + at + SIZE // 2, second.to(element), mask=inside)


def make_heads(
    qkv_TO: Tensor,
    out_TO: Tensor,
    turn: tuple[Tensor, Tensor] | None,
    gains: tuple[Tensor, Tensor] | None,
    addend: Addend,
    *,
    heads: tuple[int, int, int],
    eps: float,
) -> None:
    """See `rotary_triton.make_heads`; written into out_TO. turn: cos, sin. heads: of queries, of keys, their size."""
    few = addend.low.few
    assert few is not None
    count, kv_heads, size = heads
    _make_heads_kernel[(qkv_TO.shape[0], count + 2 * kv_heads)](
        qkv_TO,
        qkv_TO.stride(0),
        out_TO,
        out_TO.stride(0),
        *((qkv_TO, qkv_TO) if turn is None else turn),
        *((qkv_TO, qkv_TO) if gains is None else gains),
        addend.low_TW,
        addend.low_TW.stride(0),
        few.slot_T,
        addend.low.table_SF,
        eps,
        HEADS=count,
        KV_HEADS=kv_heads,
        SIZE=size,
        HALF=power_of_two(size // 2, least=16),
        ROTATE=turn is not None,
        NORM=gains is not None,
        num_warps=1,
    )
