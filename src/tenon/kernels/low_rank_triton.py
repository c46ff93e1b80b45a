"""The Triton kernels of `low_rank`, and the pieces that other kernels take from here to add a low-rank term themselves.

A program works on the tokens of one tile, which belong to one slot; it reads that slot's addresses, ranks and scales
from a table, so slots of any rank share one launch. Accumulators are fp32; a gradient is made by one program for each
block of it, in a fixed order, so that it is the same in every run.

Shape legend as in `low_rank`; R is padded to a power of two of at least 16, what the matrix units take.
"""

from __future__ import annotations

import itertools
from typing import Any

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
    low_ptr, stride, rows, row_mask, matrix_ptr, step_r, step_c, columns, column_mask, rank, RANK: tl.constexpr
):
    """low (rows, RANK) times a matrix whose element (r, c) lies at r step_r + c step_c: (rows, columns) fp32."""
    r = tl.arange(0, RANK)
    r_mask = r < rank
    low = tl.load(low_ptr + rows[:, None] * stride + r[None, :], mask=row_mask[:, None] & r_mask[None, :], other=0.0)
    matrix = tl.load(
        matrix_ptr + r[:, None] * step_r + columns[None, :].to(tl.int64) * step_c,
        mask=r_mask[:, None] & column_mask[None, :],
        other=0.0,
    )
    return tl.dot(low, matrix, input_precision="ieee")


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
    low_ptr,
    stride,
    rows,
    row_mask,
    site,
    columns,
    width,
    draw_ptr,
    RANK: tl.constexpr,
    DROP: tl.constexpr,
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
        r = tl.arange(0, RANK)
        acc = tl.zeros((ROWS, RANK), dtype=tl.float32)
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
        if rank > 0:
            r = tl.arange(0, RANK)
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
def _gradient_a_kernel(
    x_ptr,
    x_stride,
    low_ptr,
    low_stride,
    segments_ptr,
    table_ptr,
    draw_ptr,
    width,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
    DROP: tl.constexpr,
    FIELDS: tl.constexpr,
):
    segment = segments_ptr + 3 * tl.program_id(1)
    site = table_ptr + tl.load(segment) * FIELDS
    gradient = tl.load(site + 1)
    begin, end = tl.load(segment + 1), tl.load(segment + 2)
    if gradient != 0:
        grad_ptr = gradient.to(tl.pointer_type(tl.float32))
        rank = tl.load(site + 2).to(tl.int32)
        r = tl.arange(0, RANK)
        d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        acc = tl.zeros((RANK, COLUMNS), dtype=tl.float32)
        if DROP:
            salt, threshold = tl.load(site + 5), tl.load(site + 3)
            scale = bits_to_float(tl.load(site + 4))
        for start in range(begin, end, DEPTH):
            t = start + tl.arange(0, DEPTH)
            inside = t < end
            rows = t.to(tl.int64)
            low = tl.load(
                low_ptr + rows[None, :] * low_stride + r[:, None], mask=inside[None, :] & (r < rank)[:, None], other=0.0
            )
            x = tl.load(
                x_ptr + rows[:, None] * x_stride + d[None, :], mask=inside[:, None] & (d < width)[None, :], other=0.0
            )
            if DROP:
                keys = tl.load(draw_ptr + rows, mask=inside, other=0)
                x = tl.where(keep(keys, salt, d, threshold), x * scale, 0.0).to(low.dtype)
            acc = tl.dot(low, x, acc, input_precision="ieee")
        target = grad_ptr + r[:, None].to(tl.int64) * width + d[None, :]
        mask = (r < rank)[:, None] & (d < width)[None, :]
        tl.store(target, tl.load(target, mask=mask, other=0.0) + acc, mask=mask)


@jit
def _gradient_b_kernel(
    dy_ptr,
    dy_stride,
    low_ptr,
    low_stride,
    segments_ptr,
    table_ptr,
    bound_0,
    bound_1,
    bound_2,
    bound_3,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
    FIELDS: tl.constexpr,
):
    # Blocks of columns are counted module by module, so that none lies across two.
    pid = tl.program_id(0)
    blocks_0, blocks_1 = tl.cdiv(bound_1 - bound_0, COLUMNS), tl.cdiv(bound_2 - bound_1, COLUMNS)
    member = tl.where(pid < blocks_0, 0, tl.where(pid < blocks_0 + blocks_1, 1, 2))
    block = pid - tl.where(member == 0, 0, tl.where(member == 1, blocks_0, blocks_0 + blocks_1))
    first = tl.where(member == 0, bound_0, tl.where(member == 1, bound_1, bound_2))
    outputs = tl.where(member == 0, bound_1, tl.where(member == 1, bound_2, bound_3)) - first
    segment = segments_ptr + 3 * tl.program_id(1)
    at = table_ptr + tl.load(segment) * FIELDS + 6 + member * 5
    gradient = tl.load(at + 1)
    begin, end = tl.load(segment + 1), tl.load(segment + 2)
    if gradient != 0:
        grad_ptr = gradient.to(tl.pointer_type(tl.float32))
        rank = tl.load(at + 2).to(tl.int32)
        low_start = tl.load(at + 3)
        r = tl.arange(0, RANK)
        o = block * COLUMNS + tl.arange(0, COLUMNS)
        acc = tl.zeros((RANK, COLUMNS), dtype=tl.float32)
        for start in range(begin, end, DEPTH):
            t = start + tl.arange(0, DEPTH)
            inside = t < end
            rows = t.to(tl.int64)
            low = tl.load(
                low_ptr + rows[None, :] * low_stride + low_start + r[:, None],
                mask=inside[None, :] & (r < rank)[:, None],
                other=0.0,
            )
            dy = tl.load(
                dy_ptr + rows[:, None] * dy_stride + (first + o)[None, :],
                mask=inside[:, None] & (o < outputs)[None, :],
                other=0.0,
            )
            acc = tl.dot(low, dy, acc, input_precision="ieee")
        acc = tl.trans(acc) * bits_to_float(tl.load(at + 4))
        target = grad_ptr + o[:, None].to(tl.int64) * rank + r[None, :]
        mask = (o < outputs)[:, None] & (r < rank)[None, :]
        tl.store(target, tl.load(target, mask=mask, other=0.0) + acc, mask=mask)


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
    pid = tl.program_id(1)
    blocks_0, blocks_1 = tl.cdiv(bound_1 - bound_0, COLUMNS), tl.cdiv(bound_2 - bound_1, COLUMNS)
    member = tl.where(pid < blocks_0, 0, tl.where(pid < blocks_0 + blocks_1, 1, 2))
    block = pid - tl.where(member == 0, 0, tl.where(member == 1, blocks_0, blocks_0 + blocks_1))
    first = tl.where(member == 0, bound_0, tl.where(member == 1, bound_1, bound_2))
    outputs = tl.where(member == 0, bound_1, tl.where(member == 1, bound_2, bound_3)) - first
    if slot >= 0:
        site = table_ptr + slot * FIELDS
        o = block * COLUMNS + tl.arange(0, COLUMNS)
        mask = row_mask[:, None] & (o < outputs)[None, :]
        if BACK:
            term = input_block(low_ptr, low_stride, rows, row_mask, site, o, outputs, draw_ptr, RANK, DROP)
        else:
            term = member_block(low_ptr, low_stride, rows, row_mask, site, member, o, o < outputs, RANK)
        target = y_ptr + rows[:, None] * y_stride + (first + o)[None, :]
        y = tl.load(target, mask=mask, other=0.0)
        tl.store(target, (y.to(tl.float32) + term).to(y.dtype), mask=mask)


# ---- launches -------------------------------------------------------------------------------------------------------


def padded_rank(rank: int) -> int:
    """A rank as the matrix units take it."""
    return power_of_two(rank, least=16)


def row_block(tokens: int) -> int:
    """Tokens of one program: fewer when there are few, so that all of the GPU has work."""
    return 64 if tokens > 16_384 else 32 if tokens > 4_096 else 16


def four_bounds(bounds: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The bounds of one to three modules as four numbers; those that are missing are empty."""
    padded = (*bounds, *(bounds[-1] for _ in range(4 - len(bounds))))
    return padded[0], padded[1], padded[2], padded[3]


def _column_blocks(bounds: tuple[int, ...], columns: int) -> int:
    return sum(ceil_div(b - a, columns) for a, b in itertools.pairwise(bounds))


def project(x_TD: Tensor, low_TW: Tensor, routes: Any, table_SF: Tensor) -> None:
    """See `low_rank.project`."""
    rows = row_block(x_TD.shape[0])
    drop = routes.draw_T is not None
    _project_kernel[(routes.tiles_N3.shape[0] * (TILE // rows),)](
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
        RANK=padded_rank(low_TW.shape[1]),
        DROP=drop,
        FIELDS=FIELDS,
        num_warps=4,
        num_stages=4,
    )


def project_back(
    dy_TO: Tensor, d_low_TW: Tensor, bounds: tuple[int, ...], rank: int, routes: Any, table_SF: Tensor
) -> None:
    """See `low_rank.project_back`."""
    rows = row_block(dy_TO.shape[0])
    _project_back_kernel[(routes.tiles_N3.shape[0] * (TILE // rows), len(bounds) - 1)](
        dy_TO,
        dy_TO.stride(0),
        d_low_TW,
        d_low_TW.stride(0),
        routes.tiles_N3,
        table_SF,
        *four_bounds(bounds),
        ROWS=rows,
        DEPTH=128,
        RANK=padded_rank(rank),
        FIELDS=FIELDS,
        num_warps=4,
        num_stages=4,
    )


def add_gradient_a(x_TD: Tensor, d_low_TW: Tensor, routes: Any, table_SF: Tensor) -> None:
    """See `low_rank.add_gradient_a`."""
    drop = routes.draw_T is not None
    columns = 64
    _gradient_a_kernel[(ceil_div(x_TD.shape[1], columns), routes.segments_M3.shape[0])](
        x_TD,
        x_TD.stride(0),
        d_low_TW,
        d_low_TW.stride(0),
        routes.segments_M3,
        table_SF,
        routes.draw_T if drop else d_low_TW,
        x_TD.shape[1],
        COLUMNS=columns,
        DEPTH=64,
        RANK=padded_rank(d_low_TW.shape[1]),
        DROP=drop,
        FIELDS=FIELDS,
        num_warps=4,
        num_stages=5,
    )


def add_gradient_b(
    dy_TO: Tensor, low_TW: Tensor, bounds: tuple[int, ...], rank: int, routes: Any, table_SF: Tensor
) -> None:
    """See `low_rank.add_gradient_b`."""
    columns = 64
    _gradient_b_kernel[(_column_blocks(bounds, columns), routes.segments_M3.shape[0])](
        dy_TO,
        dy_TO.stride(0),
        low_TW,
        low_TW.stride(0),
        routes.segments_M3,
        table_SF,
        *four_bounds(bounds),
        COLUMNS=columns,
        DEPTH=64,
        RANK=padded_rank(rank),
        FIELDS=FIELDS,
        num_warps=4,
        num_stages=5,
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
    _add_kernel[(routes.tiles_N3.shape[0], _column_blocks(bounds, columns))](
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
