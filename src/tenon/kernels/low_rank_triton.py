"""The Triton kernels of `low_rank` that make and add low-rank terms. Shape legend as there."""

# In a kernel, what a flag leaves unbound is never compiled.
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

from typing import Any

from torch import Tensor

from tenon.kernels.blocks_triton import (
    TILE,
    bits_to_float,
    column_blocks,
    four_bounds,
    input_block,
    keep,
    locate,
    matrix_at,
    member_at,
    member_block,
    padded_rank,
    ranks_at,
    row_block,
    site_at,
    tile_rows,
)
from tenon.kernels.gpu import ceil_div, jit, tl


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
):
    slot, rows, row_mask = tile_rows(tiles_ptr, ROWS)
    if slot >= 0:
        site = site_at(table_ptr, slot)
        a_ptr, rank = matrix_at(tl.load(site), low_ptr), ranks_at(site + 2)
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
):
    slot, rows, row_mask = tile_rows(tiles_ptr, ROWS)
    member = tl.program_id(1)
    begin = tl.where(member == 0, bound_0, tl.where(member == 1, bound_1, bound_2))
    end = tl.where(member == 0, bound_1, tl.where(member == 1, bound_2, bound_3))
    if slot >= 0:
        at = member_at(site_at(table_ptr, slot), member)
        b_ptr, rank = matrix_at(tl.load(at), low_ptr), ranks_at(at + 2)
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
            target = low_ptr + rows[:, None] * low_stride + ranks_at(at + 3) + r[None, :]
            tl.store(target, acc.to(low_ptr.dtype.element_ty), mask=row_mask[:, None] & (r < rank)[None, :])


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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    BACK: tl.constexpr,
    DROP: tl.constexpr,
):
    slot, rows, row_mask = tile_rows(tiles_ptr, ROWS)
    member, first, outputs, o = locate(tl.program_id(1), bound_0, bound_1, bound_2, bound_3, COLUMNS)
    if slot >= 0:
        site = site_at(table_ptr, slot)
        mask = row_mask[:, None] & (o < outputs)[None, :]
        if BACK:
            term = input_block(low_ptr, low_stride, rows, row_mask, site, o, outputs, draw_ptr, RANK, DROP)
        else:
            term = member_block(low_ptr, low_stride, rows, row_mask, site, member, o, o < outputs, RANK)
        target = y_ptr + rows[:, None] * y_stride + (first + o)[None, :]
        y = tl.load(target, mask=mask, other=0.0)
        tl.store(target, (y.to(tl.float32) + term).to(y.dtype), mask=mask)


def project(x_TD: Tensor, low_TW: Tensor, width: int, routes: Any, table_SF: Any) -> None:
    """See `low_rank.project`. width: the widest low."""
    rows, rank = row_block(x_TD.shape[0]), padded_rank(width)
    drop = routes.draw_T is not None
    _project_kernel[(routes.tiles_N3.shape[0] * (TILE // rows), ceil_div(width, rank))](
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
        num_warps=4,
        num_stages=4,
    )


def project_back(
    dy_TO: Tensor, d_low_TW: Tensor, bounds: tuple[int, ...], rank: int, routes: Any, table_SF: Any
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
        num_warps=4,
        num_stages=4,
    )


def add(
    y_TO: Tensor,
    low_TW: Tensor,
    bounds: tuple[int, ...],
    rank: int,
    routes: Any,
    table_SF: Any,
    *,
    back: bool,
) -> None:
    """See `low_rank.Sum.settled`. rank: the widest term; back: y is a gradient of inputs."""
    columns = 128
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
        ROWS=TILE,
        COLUMNS=columns,
        RANK=padded_rank(rank),
        BACK=back,
        DROP=drop,
        num_warps=4,
    )
