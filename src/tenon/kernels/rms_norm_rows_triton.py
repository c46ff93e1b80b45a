"""The Triton kernels of `rms_norm` where a program has one token: no low-rank term is to be added, or to few tokens.

Its features stay in registers, so every number is read once, and the result can be rounded to fp8 before it leaves.
Shape legend as in `rms_norm`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tenon.kernels.fp8 import FP8_MAX, SMALLEST_AMAX
from tenon.kernels.fp8_triton import store_row
from tenon.kernels.gpu import jit, power_of_two, tl
from tenon.kernels.low_rank import Sum
from tenon.kernels.low_rank_few_triton import row_term

if TYPE_CHECKING:
    from tenon.kernels.rms_norm import Quantised

# Features that a program holds in registers.
LONGEST = 16_384
# Ranks of a term that it holds at a time.
_RANKS = 8


@jit
def _row_kernel(
    x_ptr,
    x_stride,
    y_ptr,
    y_stride,
    n_ptr,
    n_stride,
    weight_ptr,
    values_ptr,
    scale_ptr,
    low_ptr,
    low_stride,
    slot_ptr,
    table_ptr,
    eps,
    fp8_max,
    smallest_amax,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    UPDATE: tl.constexpr,
    QUANTISE: tl.constexpr,
    TERM: tl.constexpr,
    RANKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, COLUMNS)
    inside = d < WIDTH
    x = tl.load(x_ptr + row * x_stride + d, mask=inside, other=0.0)
    if UPDATE:
        y = tl.load(y_ptr + row * y_stride + d, mask=inside, other=0.0)
        total = x.to(tl.float32) + y.to(tl.float32)
        if TERM:
            total += row_term(low_ptr, low_stride, row, tl.load(slot_ptr + row), table_ptr, 0, d, inside, RANKS)
        x = total.to(x.dtype)
        tl.store(y_ptr + row * y_stride + d, x, mask=inside)
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


def _warps(columns: int) -> int:
    return max(1, min(16, columns // 1024))


def add_norm_of_rows(
    x_TD: Tensor, update: Sum | None, weight_D: Tensor, eps: float, n_TD: Tensor, quantised: Quantised | None
) -> tuple[Tensor, Tensor]:
    """See `rms_norm.add_norm`; n is written into n_TD."""
    tokens, width = x_TD.shape
    y_TD, columns = x_TD if update is None else update.y_TO, power_of_two(width, least=128)
    addend = None if update is None else update.addend
    few = None if addend is None else addend.low.few
    low_TW = n_TD if addend is None else addend.low_TW
    if not tokens:
        return y_TD, n_TD
    _row_kernel[(tokens,)](
        x_TD,
        x_TD.stride(0),
        y_TD,
        y_TD.stride(0),
        n_TD,
        n_TD.stride(0),
        weight_D,
        n_TD if quantised is None else quantised.rows.values_TD,
        n_TD if quantised is None else quantised.rows.scale_T,
        low_TW,
        low_TW.stride(0),
        n_TD if few is None else few.slot_T,
        n_TD if addend is None else addend.low.table_SF,
        eps,
        FP8_MAX,
        SMALLEST_AMAX,
        WIDTH=width,
        COLUMNS=columns,
        UPDATE=update is not None,
        QUANTISE=quantised is not None,
        TERM=few is not None,
        RANKS=_RANKS,
        num_warps=_warps(columns) if addend is None else 16,
        enable_fp_fusion=False,
    )
    if update is not None:
        update.addend = None
    return y_TD, n_TD


def backward_of_rows(
    dn_TD: Tensor,
    x_TD: Tensor,
    residual_TD: Tensor | None,
    weight_D: Tensor,
    eps: float,
    dx_TD: Tensor,
    quantised: Quantised | None,
) -> Tensor:
    """n, made again; dx is written into dx_TD. See `rms_norm.add_norm_backward`."""
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
