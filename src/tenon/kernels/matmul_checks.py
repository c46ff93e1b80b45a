"""Checks of the matrix products that training stands on: bf16, and fp8 with a scale a row.

Shape legend: M rows of x, K shared, N rows of W; y = x W^T. This module does not know who asks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tenon.kernels.attention_checks import largest_error, random_tensor

_M, _K, _N = 192, 512, 256


def bf16_matmul_error(device: torch.device) -> float:
    """The relative error of x W^T in bf16 against float64."""
    x_MK = random_tensor((_M, _K), 0, torch.bfloat16, device)
    w_NK = random_tensor((_N, _K), 1, torch.bfloat16, device)
    return largest_error([x_MK @ w_NK.T], [x_MK.double() @ w_NK.double().T])


def fp8_matmul_error(device: torch.device) -> float:
    """The relative error of torch._scaled_mm, E4M3 with a scale a row of x and of W, against the same bytes in float64.

    The error of quantising is not in it.
    """
    x8_MK, x_scale_M1 = quantise_rows(random_tensor((_M, _K), 0, torch.float32, device))
    w8_NK, w_scale_N1 = quantise_rows(random_tensor((_N, _K), 1, torch.float32, device))
    y_MN = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        x8_MK, w8_NK.T, scale_a=x_scale_M1, scale_b=w_scale_N1.T.contiguous(), out_dtype=torch.bfloat16
    )
    exact_MK = x8_MK.double() * x_scale_M1.double()
    exact_NK = w8_NK.double() * w_scale_N1.double()
    return largest_error([y_MN], [exact_MK @ exact_NK.T])


def quantise_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 values and the scale (M, 1), fp32, that gives each row back: the largest of a row becomes 448."""
    scale_M1 = x_MK.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (x_MK / scale_M1).to(torch.float8_e4m3fn), scale_M1
