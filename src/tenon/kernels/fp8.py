"""Rows in fp8 (E4M3) with one scale a row, and products of two such matrices.

    amax_t = max_d |x_td c_d|,   scale_t = amax_t / 448,   v_td = e4m3(x_td c_d * 448 / amax_t)
    x_td c_d ~ v_td scale_t,     y_to = (sum_d v_td w_od) scale_t scale_o + bias_o

c_d is an optional scale of the columns, folded in before the row's own scale is found: with the scales s_o of a
weight's rows folded into dY, the weight's fp8 values alone serve its transposed product (`dX = (dY s) V`, the scale of
V^T is 1).

448 is E4M3's largest number. Nothing is clamped: a quotient above 448 by a rounding error rounds back to 448. A row of
zeros has the scale of SMALLEST_AMAX, which is so small because gradients of a mean over many tokens, times s_o, are; a
row that is not finite stays not finite.

Source: Micikevicius et al., 2022 (FP8 formats for deep learning). Shape legend: T rows, D features, O outputs.
This module does not know which matrix is a weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tenon.kernels import fp8_triton as fused

FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = 448.0
SMALLEST_AMAX = 1e-30
# The tensor cores' products want rows of whole 16-byte pieces.
FP8_MULTIPLE = 16
FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    """A matrix (T, D) in E4M3, contiguous, with the fp32 scale (T) of each row."""

    values_TD: Tensor
    scale_T: Tensor


def empty_rows(tokens: int, width: int, device: torch.device) -> Fp8Rows:
    """Room for (T, D), not initialised."""
    values_TD = torch.empty((tokens, width), dtype=FP8_DTYPE, device=device)
    return Fp8Rows(values_TD, torch.empty(tokens, dtype=torch.float32, device=device))


def quantise_rows_reference(x_TD: Tensor, column_scale_D: Tensor | None = None) -> Fp8Rows:
    """The formula in plain torch."""
    x = x_TD.float() if column_scale_D is None else x_TD.float() * column_scale_D
    amax_T = x.abs().amax(dim=1).clamp(min=SMALLEST_AMAX) if x.shape[1] else x.new_full((len(x),), SMALLEST_AMAX)
    scale_T, inverse_T = row_scales(amax_T, FP8_MAX)
    return Fp8Rows((x * inverse_T[:, None]).to(FP8_DTYPE), scale_T)


def row_scales(amax_T: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """(amax / largest, largest / amax), each (T) and rounded once: the same bits on every device.

    Both are quotients of two tensors of one device. Beside a Python number torch multiplies with a reciprocal: on a GPU
    for the first, everywhere for the second.
    """
    top = amax_T.new_full((), largest)
    return amax_T / top, top / amax_T


def quantise_rows(x_TD: Tensor, column_scale_D: Tensor | None = None) -> Fp8Rows:
    """(T, D) of any float dtype -> fp8 rows; one pass over the rows on a GPU that has fp8."""
    if not has_fp8(x_TD.device):
        return quantise_rows_reference(x_TD, column_scale_D)
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    rows = empty_rows(x_TD.shape[0], x_TD.shape[1], x_TD.device)
    fill_rows(rows, x_TD, column_scale_D)
    return rows


def fill_rows(rows: Fp8Rows, x_TD: Tensor, column_scale_D: Tensor | None = None) -> None:
    """Quantise into room that is there, on a GPU that has fp8 (or in Triton's interpreter)."""
    fused.quantise_rows(
        x_TD, column_scale_D, rows.values_TD, rows.scale_T, fp8_max=FP8_MAX, smallest_amax=SMALLEST_AMAX
    )


def dequantise_rows(rows: Fp8Rows, dtype: torch.dtype) -> Tensor:
    """(T, D): values times scales, rounded once to dtype."""
    return (rows.values_TD.float() * rows.scale_T[:, None]).to(dtype)


def transposed(values_TD: Tensor) -> Tensor:
    """(T, D) fp8, contiguous -> (D, T), contiguous: the same bytes, elsewhere."""
    bytes_TD = values_TD.view(torch.uint8)
    if not values_TD.is_cuda:
        return bytes_TD.t().contiguous().view(FP8_DTYPE)
    out_DT = torch.empty_like(bytes_TD.t(), memory_format=torch.contiguous_format)
    fused.transpose(bytes_TD, out_DT)
    return out_DT.view(FP8_DTYPE)


@cache
def has_fp8(device: torch.device) -> bool:
    """Whether the device computes with fp8 itself: a GPU of compute capability 8.9 or later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def multiplies_fp8(device: torch.device, outputs: int, inputs: int) -> bool:
    """Whether the device has fp8 products with a frozen matrix (O, D) of these sizes, both ways."""
    return has_fp8(device) and not outputs % FP8_MULTIPLE and not inputs % FP8_MULTIPLE


def product_reference(x: Fp8Rows, w: Fp8Rows, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(T, D), (O, D) -> (T, O) in plain torch: the same rounded values, multiplied in fp32 (fp64 for fp64)."""
    wide = torch.promote_types(dtype, torch.float32)
    y_TO = dequantise_rows(x, wide) @ dequantise_rows(w, wide).t()
    return (y_TO if bias_O is None else y_TO + bias_O).to(dtype)


def product(x: Fp8Rows, w: Fp8Rows, bias_O: Tensor | None, dtype: torch.dtype, *, fast: bool) -> Tensor:
    """(T, D), (O, D) -> (T, O) by the tensor cores; only where `multiplies_fp8`.

    fast: add up in the tensor cores' own registers (about 14 bits); otherwise partial sums move to fp32.
    """
    if not len(x.values_TD):
        return x.scale_T.new_empty((0, len(w.values_TD)), dtype=dtype)
    y_TO = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        x.values_TD,
        w.values_TD.t(),
        scale_a=x.scale_T[:, None],
        scale_b=w.scale_T[None, :],
        bias=None if bias_O is None else bias_O.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )
    return y_TO.to(dtype)
