"""The Triton kernels of `fp8`: quantise rows in one pass, and transpose bytes.

A program takes one row: up to LONGEST features stay in registers between the maximum and the quotients; a longer row is
read twice, the second time from the cache. Shape legend as in `fp8`.
"""

from __future__ import annotations

from torch import Tensor

from tenon.kernels.gpu import ceil_div, jit, power_of_two, tl

LONGEST = 32_768
TILE = 128


@jit
def _load(x_ptr, column_scale_ptr, start, WIDTH: tl.constexpr, FOLD: tl.constexpr, COLUMNS: tl.constexpr):
    """(COLUMNS) fp32 of one row from `start` on, times the columns' scales."""
    d = start + tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + d, mask=d < WIDTH, other=0.0).to(tl.float32)
    if FOLD:
        x = x * tl.load(column_scale_ptr + d, mask=d < WIDTH, other=0.0)
    return x


@jit
def store_row(x, inside, values_ptr, scale_ptr, fp8_max, smallest_amax):
    """Write one row, fp32 in registers, as fp8 with its scale. values_ptr: to each of its places."""
    amax = tl.maximum(tl.max(tl.abs(x), axis=0), smallest_amax)
    tl.store(values_ptr, (x * tl.div_rn(fp8_max, amax)).to(values_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr, tl.div_rn(amax, fp8_max))


@jit
def _quantise_kernel(
    x_ptr,
    x_stride,
    column_scale_ptr,
    values_ptr,
    scale_ptr,
    fp8_max,
    smallest_amax,
    WIDTH: tl.constexpr,
    FOLD: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    values_ptr += row * WIDTH
    if WHOLE:
        x = _load(x_ptr, column_scale_ptr, 0, WIDTH, FOLD, COLUMNS)
        d = tl.arange(0, COLUMNS)
        store_row(x, d < WIDTH, values_ptr + d, scale_ptr + row, fp8_max, smallest_amax)
    else:
        largest = tl.zeros((COLUMNS,), dtype=tl.float32)
        for start in range(0, WIDTH, COLUMNS):
            x = _load(x_ptr, column_scale_ptr, start, WIDTH, FOLD, COLUMNS)
            largest = tl.maximum(largest, tl.abs(x))
        amax = tl.maximum(tl.max(largest, axis=0), smallest_amax)
        inverse = tl.div_rn(fp8_max, amax)
        for start in range(0, WIDTH, COLUMNS):
            x = _load(x_ptr, column_scale_ptr, start, WIDTH, FOLD, COLUMNS)
            d = start + tl.arange(0, COLUMNS)
            tl.store(values_ptr + d, (x * inverse).to(values_ptr.dtype.element_ty), mask=d < WIDTH)
        tl.store(scale_ptr + row, tl.div_rn(amax, fp8_max))


@jit
def _transpose_kernel(x_ptr, out_ptr, rows, columns, TILE: tl.constexpr):
    t = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    d = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = (t < rows)[:, None] & (d < columns)[None, :]
    tile = tl.load(x_ptr + t[:, None] * columns + d[None, :], mask=mask, other=0)
    tl.store(out_ptr + d[:, None] * rows + t[None, :], tl.trans(tile), mask=tl.trans(mask))


def quantise_rows(
    x_TD: Tensor,
    column_scale_D: Tensor | None,
    values_TD: Tensor,
    scale_T: Tensor,
    *,
    fp8_max: float,
    smallest_amax: float,
    longest: int = LONGEST,
) -> None:
    """Fill values (T, D) and scale (T). x_TD: any float dtype, its features contiguous."""
    tokens, width = x_TD.shape
    if not tokens:
        return
    columns = min(power_of_two(width, least=128), longest)
    _quantise_kernel[(tokens,)](
        x_TD,
        x_TD.stride(0),
        scale_T if column_scale_D is None else column_scale_D,
        values_TD,
        scale_T,
        fp8_max,
        smallest_amax,
        WIDTH=width,
        FOLD=column_scale_D is not None,
        COLUMNS=columns,
        WHOLE=width <= columns,
        num_warps=max(1, min(16, columns // 1024)),
        enable_fp_fusion=False,
    )


def transpose(x_TD: Tensor, out_DT: Tensor) -> None:
    """Fill (D, T) with the bytes of (T, D); both uint8 and contiguous."""
    rows, columns = x_TD.shape
    if not rows or not columns:
        return
    _transpose_kernel[(ceil_div(columns, TILE), ceil_div(rows, TILE))](
        x_TD, out_DT, rows, columns, TILE=TILE, num_warps=8
    )
