"""The Triton kernels of `rms_norm`: sum, low-rank term and norm in one launch, forward and backward.

A low-rank term's product wants sixteen tokens: a program takes these through two passes over their features, the first
of which makes the sums that the norm needs, the second the results; what the second reads again lies in the cache.
Without a term, or with few tokens, `rms_norm_rows_triton` reads everything once. Shape legend as in `rms_norm`.
"""

# tl.range is a range to Triton alone.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tenon.kernels.blocks_triton import FIELDS, TILE, block_rows, input_block, member_block, padded_rank
from tenon.kernels.fp8 import fill_rows
from tenon.kernels.gpu import jit, tl
from tenon.kernels.low_rank import LowRank, Routes, Sum, settle_if_long
from tenon.kernels.rms_norm_rows_triton import LONGEST, add_norm_of_rows, backward_of_rows

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


_ROWS = 16
_COLUMNS = 256


def _grid(routes: Routes | None, tokens: int) -> tuple[int]:
    return (-(-tokens // _ROWS) if routes is None else routes.tiles_N3.shape[0] * (TILE // _ROWS),)


def _by_rows(width: int, low: LowRank | None) -> bool:
    """Whether a program takes one token. low: whose term is added by the norm itself, unless it is settled before."""
    return width <= LONGEST and (low is None or low.plain or low.rides or low.few is not None)


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
        if update.addend is not None and update.addend.low.tiles_alone:
            # Two passes are faster than one whose programs are as few as the tiles of a short prompt.
            update.settled()
        added = None if update.addend is None else update.addend.low
    if _by_rows(x_TD.shape[1], added):
        return add_norm_of_rows(x_TD, update, weight_D, eps, n_TD, quantised)
    stream_TD, n_TD = _add_norm_of_tiles(x_TD, update, weight_D, eps, n_TD)
    if quantised is not None:
        fill_rows(quantised.rows, n_TD, quantised.column_scale_D)
    return stream_TD, n_TD


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
        return backward_of_rows(dn.y_TO, x_TD, residual_TD, weight_D, eps, dx_TD, quantised)
    n_TD = _backward_of_tiles(dn, x_TD, residual_TD, weight_D, eps, dx_TD)
    if quantised is not None:
        fill_rows(quantised.rows, dx_TD, quantised.column_scale_D)
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
