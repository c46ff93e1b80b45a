"""What works on this machine: every kernel and back end is run on small random inputs and held against its reference.

A new kernel is one line in `kernel_checks`. This module does not know how results are shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch.nn.attention import SDPBackend

from tenon.kernels import attention_cudnn
from tenon.kernels.attention_checks import cudnn_rows_error, sdpa_error, varlen_error
from tenon.kernels.frozen_checks import fp8_rows_error, int8_error, nf4_error, nf4_fp8_error
from tenon.kernels.gpu_errors import first_line
from tenon.kernels.matmul_checks import bf16_matmul_error, fp8_matmul_error
from tenon.kernels.step_checks import (
    add_error,
    add_norm_backward_error,
    add_norm_error,
    copies_error,
    gradient_error,
    heads_backward_error,
    heads_error,
    project_back_error,
    project_error,
    softmax_gradient_error,
    swiglu_backward_error,
    swiglu_error,
)

BF16_BOUND = 2e-2
FP32_BOUND = 1e-5


@dataclass(frozen=True, slots=True)
class KernelCheck:
    """One thing that works here or does not.

    needs: the device that it is run on. run: the relative error against the plain reference, forward and gradients;
    raises when the kernel does. bound: the largest error that counts as working. instead: what a run uses otherwise.
    missing: why it cannot be run on the device, and what helps; "" where it can.
    """

    name: str
    needs: Literal["cpu", "cuda"]
    run: Callable[[torch.device], float]
    bound: float
    instead: str = "the plain reference"
    missing: Callable[[torch.device], str] = lambda _device: ""


@dataclass(frozen=True, slots=True)
class CheckOutcome:
    """How a check went. error: relative, None when there is none. problem: the first line of what was raised, or why it
    could not be run, which `ran` tells apart; else "".
    """

    error: float | None
    problem: str
    seconds: float
    ran: bool = True


def kernel_checks() -> tuple[KernelCheck, ...]:
    """Every check, cheap ones first."""
    math, flash = SDPBackend.MATH, SDPBackend.FLASH_ATTENTION
    efficient, cudnn = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION
    return (
        KernelCheck("matmul bf16", "cpu", bf16_matmul_error, BF16_BOUND, "fp32"),
        KernelCheck("matmul bf16", "cuda", bf16_matmul_error, BF16_BOUND, "fp32"),
        KernelCheck("matmul fp8, a scale a row", "cuda", fp8_matmul_error, BF16_BOUND, "a bf16 base"),
        KernelCheck("fp8 rows and their transpose", "cuda", fp8_rows_error, FP32_BOUND, "a bf16 base"),
        KernelCheck("int8 dequantised", "cuda", int8_error, FP32_BOUND),
        KernelCheck("nf4 dequantised", "cuda", nf4_error, FP32_BOUND),
        KernelCheck(
            "nf4 dequantised to fp8, both ways", "cuda", nf4_fp8_error, FP32_BOUND, "products as the precision"
        ),
        *_step_checks(),
        _sdpa("attention math", "cpu", math, instead="nothing: no attention works"),
        _sdpa("attention flash", "cpu", flash),
        _sdpa("attention flash, grouped heads", "cpu", flash, kv_heads=2),
        _sdpa("attention math", "cuda", math, instead="nothing: no attention works"),
        _sdpa("attention flash", "cuda", flash),
        _sdpa("attention flash, grouped heads", "cuda", flash, kv_heads=2),
        _sdpa("attention efficient", "cuda", efficient),
        _sdpa("attention cudnn", "cuda", cudnn),
        _varlen("attention varlen", kv_heads=4, instead="rows of like length, padded"),
        _varlen("attention varlen, grouped heads", kv_heads=2, instead="repeated heads"),
        KernelCheck(
            "attention cuDNN, rows of any lengths",
            "cuda",
            partial(cudnn_rows_error, dtype=torch.bfloat16, kv_heads=2),
            BF16_BOUND,
            "attention flash, slower",
            attention_cudnn.missing,
        ),
    )


def _step_checks() -> list[KernelCheck]:
    """The fused kernels of a step: a run that finds one of them wrong goes on without all of them (`train.proof`)."""
    checks: dict[str, Callable[[torch.device], float]] = {
        "low-rank product A x": project_error,
        "low-rank product s B^T dy": project_back_error,
        "low-rank sums": add_error,
        "gradients of A and B": gradient_error,
        "matrices copied into the weights' borders": copies_error,
        "sum and RMS norm": add_norm_error,
        "sum and RMS norm, backward": add_norm_backward_error,
        "heads: norm and rotation": heads_error,
        "heads: norm and rotation, backward": heads_backward_error,
        "SwiGLU": swiglu_error,
        "SwiGLU, backward": swiglu_backward_error,
        "softmax and its gradient": softmax_gradient_error,
    }
    instead = "plain torch for the whole step"
    return [KernelCheck(name, "cuda", run, BF16_BOUND, instead) for name, run in checks.items()]


def _sdpa(
    name: str,
    needs: Literal["cpu", "cuda"],
    backend: SDPBackend,
    *,
    kv_heads: int = 4,
    instead: str = "another attention back end",
) -> KernelCheck:
    """In the dtype that the device computes in."""
    dtype, bound = (torch.float32, FP32_BOUND) if needs == "cpu" else (torch.bfloat16, BF16_BOUND)
    return KernelCheck(
        name, needs, partial(sdpa_error, backend=backend, dtype=dtype, kv_heads=kv_heads), bound, instead
    )


def _varlen(name: str, *, kv_heads: int, instead: str) -> KernelCheck:
    return KernelCheck(
        name, "cuda", partial(varlen_error, dtype=torch.bfloat16, kv_heads=kv_heads), BF16_BOUND, instead
    )


def run_check(check: KernelCheck, device: torch.device) -> CheckOutcome:
    """Run one check. Whatever it raises is its outcome: to find that out is what it is for."""
    started = time.monotonic()
    error, problem = None, ""
    try:
        missing = check.missing(device)
        if missing:
            return CheckOutcome(None, missing, time.monotonic() - started, ran=False)
        error = check.run(device)
    except Exception as raised:  # noqa: BLE001 - a kernel under trial may raise anything
        problem = first_line(raised)
    return CheckOutcome(error, problem, time.monotonic() - started)


def still_answers(device: torch.device) -> bool:
    """Whether the device still computes: a failed kernel can leave this process without its GPU."""
    try:
        return float(torch.ones(8, device=device).sum()) == 8.0
    except RuntimeError:
        return False
