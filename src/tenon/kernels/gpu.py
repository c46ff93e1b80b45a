"""The seam to Triton: kernels are written as if it were there, and only launched where it is.

A machine without a GPU has a torch without Triton; the modules that hold kernels must still be importable there, since
their plain references are what a CPU runs. This module knows no kernel.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None

if TYPE_CHECKING or HAS_TRITON:
    import triton
    import triton.language as tl

    jit: Callable[..., Any] = triton.jit
else:
    tl = None

    def jit(function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as it is: nothing calls it where Triton is missing."""
        return function


def constant(value: int) -> Any:
    """A number of a module as its kernels can read it."""
    return tl.constexpr(value) if TYPE_CHECKING or HAS_TRITON else value


def ceil_div(whole: int, part: int) -> int:
    """How many parts cover the whole."""
    return -(-whole // part)


def power_of_two(count: int, *, least: int = 1) -> int:
    """The smallest power of two that is not less than `count` nor `least`."""
    return max(least, 1 << max(0, count - 1).bit_length())


def triton_version() -> str:
    """`triton 3.6.0`, or `no triton`."""
    return f"triton {importlib.metadata.version('triton')}" if HAS_TRITON else "no triton"


def can_fuse(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether fused kernels run there: a GPU, half precision (fp32 has no matrix units to gain from), and Triton."""
    return HAS_TRITON and device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
