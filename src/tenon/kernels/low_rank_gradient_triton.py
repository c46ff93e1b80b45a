"""The Triton kernels that sum up the gradients of A and B over tokens.

A sum over many tokens is cut into chunks: one program makes a chunk's part of a block of a gradient, a second launch
adds the parts up in the order of the chunks. So nothing depends on which program comes first, and a gradient has the
same bits in every run. Shape legend as in `low_rank`; C columns of the tensor that the gradient is summed over.
"""

# In a kernel, what a flag leaves unbound is never compiled.
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenon.kernels.blocks_triton import (
    bits_to_float,
    column_blocks,
    four_bounds,
    keep,
    locate,
    member_at,
    padded_rank,
    ranks_at,
    site_at,
)
from tenon.kernels.gpu import ceil_div, jit, tl


@jit
def gradient_facts(site, member, INPUTS: tl.constexpr):
    """(address, rank, place of its ranks in low, scale) of a gradient: of A, or of one module's B."""
    if INPUTS:
        return tl.load(site + 1), ranks_at(site + 2), 0, 1.0
    at = member_at(site, member)
    return tl.load(at + 1), ranks_at(at + 2), ranks_at(at + 3), bits_to_float(tl.load(at + 4))


@jit
def add_to_gradient(address, acc, r, columns, rank, width, INPUTS: tl.constexpr):
    """Add (ranks, columns) of fp32 to a gradient: A is (rank, width), B is (width, rank), row after row."""
    grad_ptr = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16)
    mask = (r < rank)[:, None] & (columns < width)[None, :]
    if INPUTS:
        target = grad_ptr + r[:, None].to(tl.int64) * width + columns[None, :]
    else:
        target = grad_ptr + columns[None, :].to(tl.int64) * rank + r[:, None]
    tl.store(target, tl.load(target, mask=mask, other=0.0) + acc, mask=mask)


@jit
def _gradient_kernel(
    x_ptr,
    x_stride,
    low_ptr,
    low_stride,
    partial_ptr,
    chunks_ptr,
    table_ptr,
    draw_ptr,
    bound_0,
    bound_1,
    bound_2,
    bound_3,
    ranks,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
    INPUTS: tl.constexpr,
    DIRECT: tl.constexpr,
    DROP: tl.constexpr,
):
    member, first, outputs, columns = locate(tl.program_id(0), bound_0, bound_1, bound_2, bound_3, COLUMNS)
    chunk = chunks_ptr + 3 * tl.program_id(1)
    slot = tl.load(chunk)
    if slot >= 0:
        site = site_at(table_ptr, slot)
        address, rank, low_start, scale = gradient_facts(site, member, INPUTS)
        r = tl.program_id(2) * RANK + tl.arange(0, RANK)
        begin, end = tl.load(chunk + 1), tl.load(chunk + 2)
        end = tl.where((address != 0) & (tl.program_id(2) * RANK < rank), end, begin)
        if DROP:
            salt, threshold = tl.load(site + 5), tl.load(site + 3)
            keep_scale = bits_to_float(tl.load(site + 4))
        acc = tl.zeros((RANK, COLUMNS), dtype=tl.float32)
        for start in range(begin, end, DEPTH):
            rows = start + tl.arange(0, DEPTH)
            inside = rows < end
            low = tl.load(
                low_ptr + rows[None, :] * low_stride + low_start + r[:, None],
                mask=inside[None, :] & (r < rank)[:, None],
                other=0.0,
            )
            x = tl.load(
                x_ptr + rows[:, None] * x_stride + (first + columns)[None, :],
                mask=inside[:, None] & (columns < outputs)[None, :],
                other=0.0,
            )
            if DROP:
                keys = tl.load(draw_ptr + rows, mask=inside, other=0)
                x = tl.where(keep(keys, salt, columns, threshold), x * keep_scale, 0.0).to(low.dtype)
            acc = tl.dot(low, x, acc, input_precision="ieee")
        acc = acc * scale
        if DIRECT:
            if end > begin:
                add_to_gradient(address, acc, r, columns, rank, outputs, INPUTS)
        else:
            target = partial_ptr + (tl.program_id(1) * ranks + r[:, None]).to(tl.int64) * bound_3
            mask = (r < ranks)[:, None] & (columns < outputs)[None, :]
            tl.store(target + (first + columns)[None, :], acc, mask=mask)


@jit
def _reduce_kernel(
    partial_ptr,
    segments_ptr,
    table_ptr,
    bound_0,
    bound_1,
    bound_2,
    bound_3,
    ranks,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    INPUTS: tl.constexpr,
):
    member, first, outputs, columns = locate(tl.program_id(0), bound_0, bound_1, bound_2, bound_3, COLUMNS)
    segment = segments_ptr + 3 * tl.program_id(1)
    slot = tl.load(segment)
    address, rank, _, _ = gradient_facts(site_at(table_ptr, slot), member, INPUTS)
    r = tl.program_id(2) * RANK + tl.arange(0, RANK)
    mask = (r < rank)[:, None] & (columns < outputs)[None, :]
    acc = tl.zeros((RANK, COLUMNS), dtype=tl.float32)
    for chunk in range(tl.load(segment + 1), tl.load(segment + 2)):
        source = partial_ptr + (chunk * ranks + r[:, None]).to(tl.int64) * bound_3
        acc += tl.load(source + (first + columns)[None, :], mask=mask, other=0.0)
    if address != 0:
        add_to_gradient(address, acc, r, columns, rank, outputs, INPUTS)


def partial_sums(like: Tensor, ranks: int, columns: int, routes: Any) -> Tensor | None:
    """Room for each chunk's part of a gradient (chunks, ranks, columns) fp32; None when a slot has one chunk alone."""
    if routes.whole:
        return None
    return like.new_empty(routes.chunks_C3.shape[0], ranks, columns, dtype=torch.float32)


def add_gradient(
    x_TC: Tensor,
    low_TW: Tensor,
    bounds: tuple[int, ...],
    ranks: int,
    routes: Any,
    table_SF: Any,
    *,
    inputs: bool,
) -> None:
    """Add low^T x to the gradients of A (inputs: x is the input) or of the modules' B (x is dy).

    ranks: the widest low of one gradient. See `low_rank.add_gradient_a`, `low_rank.add_gradient_b`.
    """
    rank, columns = padded_rank(ranks), 128
    drop = inputs and routes.draw_T is not None
    partial = partial_sums(x_TC, ranks, bounds[-1], routes)
    chunks = ceil_div(ranks, rank)
    _gradient_kernel[(column_blocks(bounds, columns), routes.chunks_C3.shape[0], chunks)](
        x_TC,
        x_TC.stride(0),
        low_TW,
        low_TW.stride(0),
        low_TW if partial is None else partial,
        routes.chunks_C3,
        table_SF,
        routes.draw_T if drop else low_TW,
        *four_bounds(bounds),
        ranks,
        COLUMNS=columns,
        DEPTH=64,
        RANK=rank,
        INPUTS=inputs,
        DIRECT=partial is None,
        DROP=drop,
        num_warps=4,
        num_stages=4,
    )
    if partial is not None:
        reduce_gradient(partial, bounds, routes, table_SF, inputs=inputs)


def reduce_gradient(partial: Tensor, bounds: tuple[int, ...], routes: Any, table_SF: Any, *, inputs: bool) -> None:
    """Add every chunk's part to the gradients, in the order of the chunks."""
    ranks, columns = partial.shape[1], 128
    rank = padded_rank(ranks)
    _reduce_kernel[(column_blocks(bounds, columns), routes.segments_M3.shape[0], ceil_div(ranks, rank))](
        partial,
        routes.segments_M3,
        table_SF,
        *four_bounds(bounds),
        ranks,
        COLUMNS=columns,
        RANK=rank,
        INPUTS=inputs,
        num_warps=4,
    )
