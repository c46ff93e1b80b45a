"""The Triton kernels of `low_rank`, and the pieces that other kernels take from here to add a low-rank term themselves.

A program works on the tokens of one tile, which belong to one slot; it reads that slot's addresses, ranks and scales
from a table, so slots of any rank share one launch. Accumulators are fp32; a gradient is made by one program for each
block of it, in a fixed order, so that it is the same in every run.

Shape legend as in `low_rank`; R is padded to a power of two of at least 16, what the matrix units take.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from tenon.kernels.gpu import ceil_div, jit, power_of_two, tl

# Tokens of a tile in Routes; kernels cut it into smaller blocks.
TILE = 64
MEMBERS_AT = 6
MEMBER_FIELDS = 5
FIELDS = MEMBERS_AT + 3 * MEMBER_FIELDS


@jit
def tile_rows(tiles_ptr, BLOCK: tl.constexpr, SPLIT: tl.constexpr):
    """(slot, rows, mask) of this program's block of tokens: block `pid % SPLIT` of tile `pid // SPLIT`."""
    pid = tl.program_id(0)
    tile = tiles_ptr + 3 * (pid // SPLIT)
    slot = tl.load(tile)
    stop = tl.load(tile + 2)
    rows = tl.load(tile + 1) + (pid % SPLIT) * BLOCK + tl.arange(0, BLOCK)
    return slot, rows.to(tl.int64), rows < stop


@jit
def bits_to_float(bits):
    """The fp32 number whose bits a table field holds."""
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@jit
def keep(keys, salt, columns, threshold):
    """(rows, columns) bool: which features stay; see `dropout.keep_mask`."""
    spread = columns.to(tl.uint32) * 0x9E3779B9
    x = (keys.to(tl.uint32, bitcast=True) ^ salt.to(tl.uint32))[:, None] ^ spread[None, :]
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    x = x ^ (x >> 15)
    return x.to(tl.int32, bitcast=True) >= threshold.to(tl.int32)


@jit
def low_rank_block(
    low_ptr,
    stride,
    rows,
    row_mask,
    matrix_ptr,
    step_r,
    step_c,
    columns,
    column_mask,
    rank,
    RANK: tl.constexpr,
):
    """low (rows, rank) times a matrix whose element (r, c) lies at r step_r + c step_c: (rows, columns) fp32.

    RANK ranks at a time, so that a slot of small rank does not pay for a large one beside it.
    """
    acc = tl.zeros((rows.shape[0], columns.shape[0]), dtype=tl.float32)
    for first in range(0, rank, RANK):
        r = first + tl.arange(0, RANK)
        inside = r < rank
        low = tl.load(
            low_ptr + rows[:, None] * stride + r[None, :], mask=row_mask[:, None] & inside[None, :], other=0.0
        )
        matrix = tl.load(
            matrix_ptr + r[:, None] * step_r + columns[None, :].to(tl.int64) * step_c,
            mask=inside[:, None] & column_mask[None, :],
            other=0.0,
        )
        acc = tl.dot(low, matrix, acc, input_precision="ieee")
    return acc


@jit
def member_block(low_ptr, stride, rows, row_mask, site, member, columns, column_mask, RANK: tl.constexpr):
    """s B low of one module for a block of its own outputs: (rows, columns) fp32. site: the slot's table row."""
    at = site + 6 + member * 5
    b_ptr = tl.load(at).to(low_ptr.dtype)
    rank = tl.load(at + 2).to(tl.int32)
    start = tl.load(at + 3)
    term = low_rank_block(low_ptr + start, stride, rows, row_mask, b_ptr, 1, rank, columns, column_mask, rank, RANK)
    return term * bits_to_float(tl.load(at + 4))


@jit
def input_block(
    low_ptr, stride, rows, row_mask, site, columns, width, draw_ptr, RANK: tl.constexpr, DROP: tl.constexpr
):
    """drop'(A^T d_low) for a block of inputs: (rows, columns) fp32. width: all inputs."""
    a_ptr = tl.load(site).to(low_ptr.dtype)
    rank = tl.load(site + 2).to(tl.int32)
    term = low_rank_block(low_ptr, stride, rows, row_mask, a_ptr, width, 1, columns, columns < width, rank, RANK)
    if DROP:
        keys = tl.load(draw_ptr + rows, mask=row_mask, other=0)
        stays = keep(keys, tl.load(site + 5), columns, tl.load(site + 3))
        term = tl.where(stays, term * bits_to_float(tl.load(site + 4)), 0.0)
    return term


@jit
def locate(pid, bound_0, bound_1, bound_2, bound_3, COLUMNS: tl.constexpr):
    """(module, its first output, its outputs, the block's columns within it) of a block of columns.

    Blocks are counted module by module, so that none lies across two.
    """
    blocks_0, blocks_1 = tl.cdiv(bound_1 - bound_0, COLUMNS), tl.cdiv(bound_2 - bound_1, COLUMNS)
    member = tl.where(pid < blocks_0, 0, tl.where(pid < blocks_0 + blocks_1, 1, 2))
    block = pid - tl.where(member == 0, 0, tl.where(member == 1, blocks_0, blocks_0 + blocks_1))
    first = tl.where(member == 0, bound_0, tl.where(member == 1, bound_1, bound_2))
    outputs = tl.where(member == 0, bound_1, tl.where(member == 1, bound_2, bound_3)) - first
    return member, first, outputs, block * COLUMNS + tl.arange(0, COLUMNS)


@jit
def gradient_facts(site, member, INPUTS: tl.constexpr):
    """(address, rank, place of its ranks in low, scale) of a gradient: of A, or of one module's B."""
    if INPUTS:
        return tl.load(site + 1), tl.load(site + 2).to(tl.int32), tl.load(site + 1) * 0, 1.0
    at = site + 6 + member * 5
    return tl.load(at + 1), tl.load(at + 2).to(tl.int32), tl.load(at + 3), bits_to_float(tl.load(at + 4))


@jit
def add_to_gradient(address, acc, r, columns, rank, width, INPUTS: tl.constexpr):
    """Add (ranks, columns) of fp32 to a gradient: A is (rank, width), B is (width, rank), row after row."""
    grad_ptr = address.to(tl.pointer_type(tl.float32))
    mask = (r < rank)[:, None] & (columns < width)[None, :]
    if INPUTS:
        target = grad_ptr + r[:, None].to(tl.int64) * width + columns[None, :]
    else:
        target = grad_ptr + columns[None, :].to(tl.int64) * rank + r[:, None]
    tl.store(target, tl.load(target, mask=mask, other=0.0) + acc, mask=mask)


@jit
def _project_kernel(
    x_ptr,
    x_stride,
    low_ptr,
    low_stride,
    tiles_ptr,
    table_ptr,
    draw_ptr,
    width,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
    DROP: tl.constexpr,
    FIELDS: tl.constexpr,
):
    slot, rows, row_mask = tile_rows(tiles_ptr, ROWS, 64 // ROWS)
    if slot >= 0:
        site = table_ptr + slot * FIELDS
        a_ptr = tl.load(site).to(low_ptr.dtype)
        rank = tl.load(site + 2).to(tl.int32)
        r = tl.program_id(1) * RANK + tl.arange(0, RANK)
        acc = tl.zeros((ROWS, RANK), dtype=tl.float32)
        width = tl.where(tl.program_id(1) * RANK < rank, width, 0)
        if DROP:
            keys = tl.load(draw_ptr + rows, mask=row_mask, other=0)
            salt, threshold = tl.load(site + 5), tl.load(site + 3)
            scale = bits_to_float(tl.load(site + 4))
        for start in range(0, width, DEPTH):
            d = start + tl.arange(0, DEPTH)
            x = tl.load(
                x_ptr + rows[:, None] * x_stride + d[None, :], mask=row_mask[:, None] & (d < width)[None, :], other=0.0
            )
            a = tl.load(
                a_ptr + r[None, :].to(tl.int64) * width + d[:, None],
                mask=(r < rank)[None, :] & (d < width)[:, None],
                other=0.0,
            )
            if DROP:
                stays = keep(keys, salt, d, threshold)
                x = tl.where(stays, x * scale, 0.0).to(a.dtype)
            acc = tl.dot(x, a, acc, input_precision="ieee")
        target = low_ptr + rows[:, None] * low_stride + r[None, :]
        tl.store(target, acc.to(low_ptr.dtype.element_ty), mask=row_mask[:, None] & (r < rank)[None, :])


@jit
def _project_back_kernel(
    dy_ptr,
    dy_stride,
    low_ptr,
    low_stride,
    tiles_ptr,
    table_ptr,
    bound_0,
    bound_1,
    bound_2,
    bound_3,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
    FIELDS: tl.constexpr,
):
    slot, rows, row_mask = tile_rows(tiles_ptr, ROWS, 64 // ROWS)
    member = tl.program_id(1)
    begin = tl.where(member == 0, bound_0, tl.where(member == 1, bound_1, bound_2))
    end = tl.where(member == 0, bound_1, tl.where(member == 1, bound_2, bound_3))
    if slot >= 0:
        at = table_ptr + slot * FIELDS + 6 + member * 5
        b_ptr = tl.load(at).to(low_ptr.dtype)
        rank = tl.load(at + 2).to(tl.int32)
        if tl.program_id(2) * RANK < rank:
            r = tl.program_id(2) * RANK + tl.arange(0, RANK)
            acc = tl.zeros((ROWS, RANK), dtype=tl.float32)
            outputs = end - begin
            for start in range(0, outputs, DEPTH):
                o = start + tl.arange(0, DEPTH)
                inside = o < outputs
                dy = tl.load(
                    dy_ptr + rows[:, None] * dy_stride + (begin + o)[None, :],
                    mask=row_mask[:, None] & inside[None, :],
                    other=0.0,
                )
                b = tl.load(
                    b_ptr + o[:, None] * rank + r[None, :], mask=inside[:, None] & (r < rank)[None, :], other=0.0
                )
                acc = tl.dot(dy, b, acc, input_precision="ieee")
            acc = acc * bits_to_float(tl.load(at + 4))
            target = low_ptr + rows[:, None] * low_stride + tl.load(at + 3) + r[None, :]
            tl.store(target, acc.to(low_ptr.dtype.element_ty), mask=row_mask[:, None] & (r < rank)[None, :])


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
    FIELDS: tl.constexpr,
):
    member, first, outputs, columns = locate(tl.program_id(0), bound_0, bound_1, bound_2, bound_3, COLUMNS)
    chunk = chunks_ptr + 3 * tl.program_id(1)
    slot = tl.load(chunk)
    if slot >= 0:
        site = table_ptr + slot * FIELDS
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
    FIELDS: tl.constexpr,
):
    member, first, outputs, columns = locate(tl.program_id(0), bound_0, bound_1, bound_2, bound_3, COLUMNS)
    segment = segments_ptr + 3 * tl.program_id(1)
    slot = tl.load(segment)
    address, rank, _, _ = gradient_facts(table_ptr + slot * FIELDS, member, INPUTS)
    r = tl.program_id(2) * RANK + tl.arange(0, RANK)
    mask = (r < rank)[:, None] & (columns < outputs)[None, :]
    acc = tl.zeros((RANK, COLUMNS), dtype=tl.float32)
    for chunk in range(tl.load(segment + 1), tl.load(segment + 2)):
        source = partial_ptr + (chunk * ranks + r[:, None]).to(tl.int64) * bound_3
        acc += tl.load(source + (first + columns)[None, :], mask=mask, other=0.0)
    if address != 0:
        add_to_gradient(address, acc, r, columns, rank, outputs, INPUTS)


@jit
def _add_kernel(
    y_ptr,
    y_stride,
    low_ptr,
    low_stride,
    tiles_ptr,
    table_ptr,
    draw_ptr,
    bound_0,
    bound_1,
    bound_2,
    bound_3,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    BACK: tl.constexpr,
    DROP: tl.constexpr,
    FIELDS: tl.constexpr,
):
    slot, rows, row_mask = tile_rows(tiles_ptr, 64, 1)
    member, first, outputs, o = locate(tl.program_id(1), bound_0, bound_1, bound_2, bound_3, COLUMNS)
    if slot >= 0:
        site = table_ptr + slot * FIELDS
        mask = row_mask[:, None] & (o < outputs)[None, :]
        if BACK:
            term = input_block(low_ptr, low_stride, rows, row_mask, site, o, outputs, draw_ptr, RANK, DROP)
        else:
            term = member_block(low_ptr, low_stride, rows, row_mask, site, member, o, o < outputs, RANK)
        target = y_ptr + rows[:, None] * y_stride + (first + o)[None, :]
        y = tl.load(target, mask=mask, other=0.0)
        tl.store(target, (y.to(tl.float32) + term).to(y.dtype), mask=mask)


# ---- launches -------------------------------------------------------------------------------------------------------

# Ranks of one pass of the matrix units; slots of larger rank take several.
MOST_RANK = 64


def padded_rank(rank: int) -> int:
    """A rank as the matrix units take it, at most MOST_RANK at a time."""
    return min(MOST_RANK, power_of_two(rank, least=16))


def row_block(tokens: int) -> int:
    """Tokens of one program: fewer when there are few, so that all of the GPU has work."""
    return 64 if tokens > 16_384 else 32 if tokens > 4_096 else 16


def four_bounds(bounds: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The bounds of one to three modules as four numbers; those that are missing are empty."""
    padded = (*bounds, *(bounds[-1] for _ in range(4 - len(bounds))))
    return padded[0], padded[1], padded[2], padded[3]


def column_blocks(bounds: tuple[int, ...], columns: int) -> int:
    """How many blocks of columns the modules have, each cut alone."""
    return sum(ceil_div(b - a, columns) for a, b in itertools.pairwise(bounds))


def project(x_TD: Tensor, low_TW: Tensor, routes: Any, table_SF: Tensor) -> None:
    """See `low_rank.project`."""
    rows, rank = row_block(x_TD.shape[0]), padded_rank(low_TW.shape[1])
    drop = routes.draw_T is not None
    _project_kernel[(routes.tiles_N3.shape[0] * (TILE // rows), ceil_div(low_TW.shape[1], rank))](
        x_TD,
        x_TD.stride(0),
        low_TW,
        low_TW.stride(0),
        routes.tiles_N3,
        table_SF,
        routes.draw_T if drop else low_TW,
        x_TD.shape[1],
        ROWS=rows,
        DEPTH=128,
        RANK=rank,
        DROP=drop,
        FIELDS=FIELDS,
        num_warps=4,
        num_stages=4,
    )


def project_back(
    dy_TO: Tensor, d_low_TW: Tensor, bounds: tuple[int, ...], rank: int, routes: Any, table_SF: Tensor
) -> None:
    """See `low_rank.project_back`. rank: the widest of one module."""
    rows, padded = row_block(dy_TO.shape[0]), padded_rank(rank)
    _project_back_kernel[(routes.tiles_N3.shape[0] * (TILE // rows), len(bounds) - 1, ceil_div(rank, padded))](
        dy_TO,
        dy_TO.stride(0),
        d_low_TW,
        d_low_TW.stride(0),
        routes.tiles_N3,
        table_SF,
        *four_bounds(bounds),
        ROWS=rows,
        DEPTH=128,
        RANK=padded,
        FIELDS=FIELDS,
        num_warps=4,
        num_stages=4,
    )


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
    table_SF: Tensor,
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
        FIELDS=FIELDS,
        num_warps=4,
        num_stages=4,
    )
    if partial is not None:
        reduce_gradient(partial, bounds, routes, table_SF, inputs=inputs)


def reduce_gradient(partial: Tensor, bounds: tuple[int, ...], routes: Any, table_SF: Tensor, *, inputs: bool) -> None:
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
        FIELDS=FIELDS,
        num_warps=4,
    )


def add(
    y_TO: Tensor,
    low_TW: Tensor,
    bounds: tuple[int, ...],
    rank: int,
    routes: Any,
    table_SF: Tensor,
    *,
    back: bool,
) -> None:
    """See `low_rank.Sum.settled`; back: y is a gradient of inputs."""
    columns = 128
    bounds = (0, y_TO.shape[1]) if back else bounds
    drop = back and routes.draw_T is not None
    _add_kernel[(routes.tiles_N3.shape[0], column_blocks(bounds, columns))](
        y_TO,
        y_TO.stride(0),
        low_TW,
        low_TW.stride(0),
        routes.tiles_N3,
        table_SF,
        routes.draw_T if drop else low_TW,
        *four_bounds(bounds),
        COLUMNS=columns,
        RANK=padded_rank(low_TW.shape[1] if back else rank),
        BACK=back,
        DROP=drop,
        FIELDS=FIELDS,
        num_warps=4,
    )
