"""Checks of the kernels of quantised bases: each is run and held against its plain reference, into poisoned memory.

Shape legend: O outputs, D inputs, T tokens. This module does not know who asks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tenon.kernels import fp8, fp8_triton, int8, int8_triton, nf4, nf4_triton
from tenon.kernels.attention_checks import largest_error, random_tensor

# Rows and columns that do not fill a tile.
_O, _D = 272, 320


def _poisoned(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, float("nan"), device=device).to(dtype)


def nf4_error(device: torch.device) -> float:
    """Of nf4 dequantised to fp16, which every GPU has."""
    weight = nf4.quantise(random_tensor((_O, _D), 0, torch.float32, device))
    out_OD = _poisoned((_O, _D), torch.float16, device)
    nf4_triton.dequantise(weight, out_OD)
    return largest_error([out_OD.double()], [nf4.dequantise_reference(weight).half().double()])


def nf4_fp8_error(device: torch.device) -> float:
    """Of nf4 dequantised to fp8, straight and transposed."""
    weight = nf4.quantise(random_tensor((_O, _D), 0, torch.float32, device))
    inverse_O = fp8.FP8_MAX / nf4.row_amax(weight)
    out_OD = _poisoned((_O, _D), fp8.FP8_DTYPE, device)
    out_DO = _poisoned((_D, _O), fp8.FP8_DTYPE, device)
    nf4_triton.dequantise(weight, out_OD, inverse_O)
    nf4_triton.dequantise_transposed(weight, out_DO, inverse_O)
    exact = nf4.dequantise_scaled_reference(weight, inverse_O).to(fp8.FP8_DTYPE).double()
    return largest_error([out_OD.double(), out_DO.double()], [exact, exact.t()])


def int8_error(device: torch.device) -> float:
    """Of int8 dequantised to fp16."""
    rows = int8.quantise_rows(random_tensor((_O, _D), 0, torch.float32, device))
    out_OD = _poisoned((_O, _D), torch.float16, device)
    int8_triton.dequantise_rows(rows.values_OD, rows.scale_O, out_OD)
    return largest_error([out_OD.double()], [int8.dequantise_rows_reference(rows, torch.float16).double()])


def fp8_rows_error(device: torch.device) -> float:
    """Of rows quantised to fp8 with a scale of the columns folded in, and of their transpose."""
    x_TD = random_tensor((_O, _D), 0, torch.bfloat16, device)
    scale_D = random_tensor((1, _D), 1, torch.float32, device)[0].abs() + 0.1
    values_TD, scale_T = _poisoned((_O, _D), fp8.FP8_DTYPE, device), _poisoned((1, _O), torch.float32, device)[0]
    fp8_triton.quantise_rows(x_TD, scale_D, values_TD, scale_T, fp8_max=fp8.FP8_MAX, smallest_amax=fp8.SMALLEST_AMAX)
    out_DT = torch.empty((_D, _O), dtype=torch.uint8, device=device)
    fp8_triton.transpose(values_TD.view(torch.uint8), out_DT)
    wanted = fp8.quantise_rows_reference(x_TD, scale_D)
    exact = wanted.values_TD.double()
    return largest_error(
        [values_TD.double(), out_DT.view(fp8.FP8_DTYPE).double(), scale_T.double()],
        [exact, exact.t(), wanted.scale_T.double()],
    )
