"""Weights in int8 with one scale a row.

    scale_o = max_d |w_od| / 127,   v_od = round(w_od / scale_o),   w_od ~ v_od scale_o

Shape legend: O outputs, D inputs. This module does not know what is multiplied with the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tenon.kernels import int8_triton as fused
from tenon.kernels.fp8 import row_scales

INT8_MAX = 127.0
SMALLEST_AMAX = 1e-30


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """A matrix (O, D) in int8 with the fp32 scale (O) of each row."""

    values_OD: Tensor
    scale_O: Tensor


def quantise_rows(weight_OD: Tensor) -> Int8Rows:
    """(O, D) of any float dtype -> int8 rows, ties to even."""
    w = weight_OD.float()
    amax_O = w.abs().amax(dim=1).clamp(min=SMALLEST_AMAX) if w.shape[1] else w.new_full((len(w),), SMALLEST_AMAX)
    scale_O, inverse_O = row_scales(amax_O, INT8_MAX)
    return Int8Rows((w * inverse_O[:, None]).round_().to(torch.int8), scale_O)


def dequantise_rows_reference(rows: Int8Rows, dtype: torch.dtype) -> Tensor:
    """The formula in plain torch: multiplied in fp32, rounded once to dtype."""
    return (rows.values_OD.float() * rows.scale_O[:, None]).to(dtype)


def dequantise_rows(rows: Int8Rows, dtype: torch.dtype) -> Tensor:
    """(O, D) in dtype; one pass on a GPU."""
    if not rows.values_OD.is_cuda:
        return dequantise_rows_reference(rows, dtype)
    out_OD = torch.empty(rows.values_OD.shape, dtype=dtype, device=rows.values_OD.device)
    fused.dequantise_rows(rows.values_OD, rows.scale_O, out_OD)
    return out_OD
