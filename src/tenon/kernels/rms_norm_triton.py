"""The Triton kernels of `rms_norm`: sum, low-rank term and norm in one launch, forward and backward.

Where there is no low-rank term to add, a program has one token, whose features stay in registers: every number is read
once, and the result can be rounded to fp8 before it leaves. With a term, whose product wants sixteen tokens, a program
takes these through two passes over their features: the first makes the sums that the norm needs, the second the
results; what the second reads again lies in the cache. Shape legend as in `rms_norm`.
"""

# tl.range is a range to Triton alone.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tenon.kernels.blocks_triton import FIELDS, TILE, block_rows, input_block, member_block, padded_rank
from tenon.kernels.fp8 import FP8_MAX, SMALLEST_AMAX, fill_rows
from tenon.kernels.fp8_triton import store_row
from tenon.kernels.gpu import jit, power_of_two, tl
from tenon.kernels.low_rank import LowRank, Routes, Sum, settle_if_long

if TYPE_CHECKING:
    from tenon.kernels.rms_norm import Quantised


@jit
def _add_norm_kernel(
    x_ptr,
    y_ptr,
    n_ptr,
    n_stride,
    weight_ptr,
    low_ptr,
    low_stride,
    tiles_ptr,
    table_ptr,
    tokens,
    width,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    UPDATE: tl.constexpr,
    ROUTED: tl.constexpr,
    STAGES: tl.constexpr,
    FIELDS: tl.constexpr,
):
    slot, rows, row_mask = block_rows(tiles_ptr, tokens, ROWS, ROUTED)
    squares = tl.zeros((ROWS,), dtype=tl.float32)
    for start in tl.range(0, width, COLUMNS, num_stages=STAGES):
        d = start + tl.arange(0, COLUMNS)
        at = rows[:, None] * width + d[None, :]
        mask = row_mask[:, None] & (d < width)[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0)
        if UPDATE:
            total = x.to(tl.float32) + tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
            if ROUTED:
                if slot >= 0:
                    site = table_ptr + slot * FIELDS
                    total += member_block(low_ptr, low_stride, rows, row_mask, site, 0, d, d < width, RANK)
            x = total.to(x.dtype)
            tl.store(y_ptr + at, x, mask=mask)
        wide = x.to(tl.float32)
        squares += tl.sum(wide * wide, axis=1)
    inverse = 1.0 / tl.sqrt(squares / width + eps)
    source_ptr = x_ptr
    if UPDATE:
        # The second pass reads what other threads of the program wrote in the first.
        tl.debug_barrier()
        source_ptr = y_ptr
    for start in tl.range(0, width, COLUMNS, num_stages=STAGES):
        d = start + tl.arange(0, COLUMNS)
        at = rows[:, None] * width + d[None, :]
        mask = row_mask[:, None] & (d < width)[None, :]
        x = tl.load(source_ptr + at, mask=mask, other=0.0)
        gain = tl.load(weight_ptr + d, mask=d < width, other=0.0)
        normed = (x.to(tl.float32) * inverse[:, None]).to(x.dtype)
        n = (normed.to(tl.float32) * gain.to(tl.float32)[None, :]).to(x.dtype)
        tl.store(n_ptr + rows[:, None] * n_stride + d[None, :], n, mask=mask)


@jit
def _add_norm_backward_kernel(
    dn_ptr,
    x_ptr,
    residual_ptr,
    residual_stride,
    weight_ptr,
    dx_ptr,
    dx_stride,
    n_ptr,
    low_ptr,
    low_stride,
    tiles_ptr,
    table_ptr,
    draw_ptr,
    tokens,
    width,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    ROUTED: tl.constexpr,
    DROP: tl.constexpr,
    RESIDUAL: tl.constexpr,
    STAGES: tl.constexpr,
    FIELDS: tl.constexpr,
):
    slot, rows, row_mask = block_rows(tiles_ptr, tokens, ROWS, ROUTED)
    squares = tl.zeros((ROWS,), dtype=tl.float32)
    products = tl.zeros((ROWS,), dtype=tl.float32)
    for start in tl.range(0, width, COLUMNS, num_stages=STAGES):
        d = start + tl.arange(0, COLUMNS)
        at = rows[:, None] * width + d[None, :]
        mask = row_mask[:, None] & (d < width)[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dn = tl.load(dn_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if ROUTED:
            if slot >= 0:
                site = table_ptr + slot * FIELDS
                dn += input_block(low_ptr, low_stride, rows, row_mask, site, d, width, draw_ptr, RANK, DROP)
            tl.store(dn_ptr + at, dn.to(dn_ptr.dtype.element_ty), mask=mask)
        gain = tl.load(weight_ptr + d, mask=d < width, other=0.0).to(tl.float32)
        squares += tl.sum(x * x, axis=1)
        products += tl.sum(dn * gain[None, :] * x, axis=1)
    inverse = 1.0 / tl.sqrt(squares / width + eps)
    pull = products / width * inverse * inverse
    if ROUTED:
        tl.debug_barrier()
    for start in tl.range(0, width, COLUMNS, num_stages=STAGES):
        d = start + tl.arange(0, COLUMNS)
        at = rows[:, None] * width + d[None, :]
        mask = row_mask[:, None] & (d < width)[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0)
        dn = tl.load(dn_ptr + at, mask=mask, other=0.0).to(tl.float32)
        gain = tl.load(weight_ptr + d, mask=d < width, other=0.0).to(tl.float32)
        wide = x.to(tl.float32)
        dx = inverse[:, None] * (dn * gain[None, :] - wide * pull[:, None])
        if RESIDUAL:
            passed = tl.load(residual_ptr + rows[:, None] * residual_stride + d[None, :], mask=mask, other=0.0)
            dx += passed.to(tl.float32)
        tl.store(dx_ptr + rows[:, None] * dx_stride + d[None, :], dx.to(x.dtype), mask=mask)
        normed = (wide * inverse[:, None]).to(x.dtype).to(tl.float32)
        tl.store(n_ptr + at, (normed * gain[None, :]).to(x.dtype), mask=mask)


@jit
def _row_kernel(
    x_ptr,
    y_ptr,
    n_ptr,
    n_stride,
    weight_ptr,
    values_ptr,
    scale_ptr,
    eps,
    fp8_max,
    smallest_amax,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    UPDATE: tl.constexpr,
    QUANTISE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, COLUMNS)
    inside = d < WIDTH
    x = tl.load(x_ptr + row * WIDTH + d, mask=inside, other=0.0)
    if UPDATE:
        y = tl.load(y_ptr + row * WIDTH + d, mask=inside, other=0.0)
        x = (x.to(tl.float32) + y.to(tl.float32)).to(x.dtype)
        tl.store(y_ptr + row * WIDTH + d, x, mask=inside)
    wide = x.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / WIDTH + eps)
    gain = tl.load(weight_ptr + d, mask=inside, other=0.0).to(tl.float32)
    n = ((wide * inverse).to(x.dtype).to(tl.float32) * gain).to(x.dtype)
    tl.store(n_ptr + row * n_stride + d, n, mask=inside)
    if QUANTISE:
        places = values_ptr + row * WIDTH + d
        store_row(n.to(tl.float32), inside, places, scale_ptr + row, fp8_max, smallest_amax)


@jit
def _row_backward_kernel(
    dn_ptr,
    x_ptr,
    residual_ptr,
    residual_stride,
    weight_ptr,
    dx_ptr,
    dx_stride,
    n_ptr,
    values_ptr,
    scale_ptr,
    column_scale_ptr,
    eps,
    fp8_max,
    smallest_amax,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    QUANTISE: tl.constexpr,
    FOLD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, COLUMNS)
    inside = d < WIDTH
    x = tl.load(x_ptr + row * WIDTH + d, mask=inside, other=0.0)
    dn = tl.load(dn_ptr + row * WIDTH + d, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(weight_ptr + d, mask=inside, other=0.0).to(tl.float32)
    wide = x.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / WIDTH + eps)
    pull = tl.sum(dn * gain * wide, axis=0) / WIDTH * inverse * inverse
    dx = inverse * (dn * gain - wide * pull)
    if RESIDUAL:
        dx += tl.load(residual_ptr + row * residual_stride + d, mask=inside, other=0.0).to(tl.float32)
    rounded = dx.to(x.dtype)
    tl.store(dx_ptr + row * dx_stride + d, rounded, mask=inside)
    n = ((wide * inverse).to(x.dtype).to(tl.float32) * gain).to(x.dtype)
    tl.store(n_ptr + row * WIDTH + d, n, mask=inside)
    if QUANTISE:
        folded = rounded.to(tl.float32)
        if FOLD:
            folded = folded * tl.load(column_scale_ptr + d, mask=inside, other=0.0)
        places = values_ptr + row * WIDTH + d
        store_row(folded, inside, places, scale_ptr + row, fp8_max, smallest_amax)


_ROWS = 16
_COLUMNS = 256
# Features that a program holds in registers.
_LONGEST = 16_384


def _grid(routes: Routes | None, tokens: int) -> tuple[int]:
    return (-(-tokens // _ROWS) if routes is None else routes.tiles_N3.shape[0] * (TILE // _ROWS),)


def _warps(columns: int) -> int:
    return max(1, min(16, columns // 1024))


def _by_rows(width: int, low: LowRank | None) -> bool:
    """Whether a program takes one token. low: whose term is added by the norm itself, unless it is settled before."""
    return width <= _LONGEST and (low is None or low.plain or low.rides)


def add_norm(
    x_TD: Tensor,
    update: Sum | None,
    weight_D: Tensor,
    eps: float,
    n_TD: Tensor,
    quantised: Quantised | None,
    added: LowRank | None,
) -> tuple[Tensor, Tensor]:
    """See `rms_norm.add_norm`; n is written into n_TD."""
    if update is not None:
        settle_if_long(update)
        added = None if update.addend is None else update.addend.low
    if _by_rows(x_TD.shape[1], added):
        return _add_norm_of_rows(x_TD, update, weight_D, eps, n_TD, quantised)
    stream_TD, n_TD = _add_norm_of_tiles(x_TD, update, weight_D, eps, n_TD)
    if quantised is not None:
        fill_rows(quantised.rows, n_TD, quantised.column_scale_D)
    return stream_TD, n_TD


def _add_norm_of_rows(
    x_TD: Tensor, update: Sum | None, weight_D: Tensor, eps: float, n_TD: Tensor, quantised: Quantised | None
) -> tuple[Tensor, Tensor]:
    tokens, width = x_TD.shape
    y_TD, columns = x_TD if update is None else update.y_TO, power_of_two(width, least=128)
    if not tokens:
        return y_TD, n_TD
    _row_kernel[(tokens,)](
        x_TD,
        y_TD,
        n_TD,
        n_TD.stride(0),
        weight_D,
        n_TD if quantised is None else quantised.rows.values_TD,
        n_TD if quantised is None else quantised.rows.scale_T,
        eps,
        FP8_MAX,
        SMALLEST_AMAX,
        WIDTH=width,
        COLUMNS=columns,
        UPDATE=update is not None,
        QUANTISE=quantised is not None,
        num_warps=_warps(columns),
        enable_fp_fusion=False,
    )
    return y_TD, n_TD


def _add_norm_of_tiles(
    x_TD: Tensor, update: Sum | None, weight_D: Tensor, eps: float, n_TD: Tensor
) -> tuple[Tensor, Tensor]:
    addend = None if update is None else update.addend
    routes = None if addend is None else addend.low.routes
    y_TD = x_TD if update is None else update.y_TO
    low_TW = y_TD if addend is None else addend.low_TW
    _add_norm_kernel[_grid(routes, x_TD.shape[0])](
        x_TD,
        y_TD,
        n_TD,
        n_TD.stride(0),
        weight_D,
        low_TW,
        low_TW.stride(0),
        x_TD if routes is None else routes.tiles_N3,
        x_TD if addend is None else addend.low.table_SF,
        x_TD.shape[0],
        x_TD.shape[1],
        eps,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        RANK=16 if addend is None else padded_rank(addend.low.rank),
        UPDATE=update is not None,
        ROUTED=routes is not None,
        STAGES=3,
        FIELDS=FIELDS,
        num_warps=4,
    )
    if update is not None:
        update.addend = None
    return y_TD, n_TD


def add_norm_backward(
    dn: Sum,
    x_TD: Tensor,
    residual_TD: Tensor | None,
    weight_D: Tensor,
    eps: float,
    dx_TD: Tensor,
    quantised: Quantised | None,
) -> Tensor:
    """n, made again; dx is written into dx_TD. See `rms_norm.add_norm_backward`."""
    settle_if_long(dn)
    if _by_rows(x_TD.shape[1], None if dn.addend is None else dn.addend.low):
        return _backward_of_rows(dn.y_TO, x_TD, residual_TD, weight_D, eps, dx_TD, quantised)
    n_TD = _backward_of_tiles(dn, x_TD, residual_TD, weight_D, eps, dx_TD)
    if quantised is not None:
        fill_rows(quantised.rows, dx_TD, quantised.column_scale_D)
    return n_TD


def _backward_of_rows(
    dn_TD: Tensor,
    x_TD: Tensor,
    residual_TD: Tensor | None,
    weight_D: Tensor,
    eps: float,
    dx_TD: Tensor,
    quantised: Quantised | None,
) -> Tensor:
    tokens, width = x_TD.shape
    n_TD, columns = torch.empty_like(x_TD), power_of_two(width, least=128)
    passed_TD = x_TD if residual_TD is None else residual_TD
    folded_D = None if quantised is None else quantised.column_scale_D
    if not tokens:
        return n_TD
    _row_backward_kernel[(tokens,)](
        dn_TD,
        x_TD,
        passed_TD,
        passed_TD.stride(0),
        weight_D,
        dx_TD,
        dx_TD.stride(0),
        n_TD,
        n_TD if quantised is None else quantised.rows.values_TD,
        n_TD if quantised is None else quantised.rows.scale_T,
        weight_D if folded_D is None else folded_D,
        eps,
        FP8_MAX,
        SMALLEST_AMAX,
        WIDTH=width,
        COLUMNS=columns,
        RESIDUAL=residual_TD is not None,
        QUANTISE=quantised is not None,
        FOLD=folded_D is not None,
        num_warps=_warps(columns),
        enable_fp_fusion=False,
    )
    return n_TD


def _backward_of_tiles(
    dn: Sum, x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float, dx_TD: Tensor
) -> Tensor:
    addend = dn.addend
    routes = None if addend is None else addend.low.routes
    drop = routes is not None and routes.draw_T is not None
    n_TD = torch.empty_like(x_TD)
    passed_TD = x_TD if residual_TD is None else residual_TD
    low_TW = dn.y_TO if addend is None else addend.low_TW
    _add_norm_backward_kernel[_grid(routes, x_TD.shape[0])](
        dn.y_TO,
        x_TD,
        passed_TD,
        passed_TD.stride(0),
        weight_D,
        dx_TD,
        dx_TD.stride(0),
        n_TD,
        low_TW,
        low_TW.stride(0),
        x_TD if routes is None else routes.tiles_N3,
        x_TD if addend is None else addend.low.table_SF,
        routes.draw_T if routes is not None and drop else x_TD,
        x_TD.shape[0],
        x_TD.shape[1],
        eps,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        RANK=16 if addend is None else padded_rank(addend.low.width),
        ROUTED=routes is not None,
        DROP=drop,
        RESIDUAL=residual_TD is not None,
        STAGES=3,
        FIELDS=FIELDS,
        num_warps=4,
    )
    dn.addend = None
    return n_TD
