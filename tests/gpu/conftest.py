"""Tests of what runs on a GPU, on one: `make test-gpu`. Without a GPU all of them are skipped.

Every kernel is held against float64, from the same rounded inputs, at sizes that fit no block, and what it returns lies
in memory that was filled with NaN. The errors that were found are recorded with the test, for benchmarks/gpu_tests.py.

`TRITON_INTERPRET=1 pytest tests/gpu` runs those of the kernels, small and in fp32, in Triton's interpreter: for writing
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.gpu.kit import INTERPRETED, Judge, bound_of, relative_error


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of these are GPU tests."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and not INTERPRETED:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run: the GPU, or the CPU under the interpreter."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that is taken uninitialised is full of NaN, and the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def judge(record_property: Callable[[str, object], None]) -> Judge:
    """judge(kernel, found, exact, roundings=1): holds a result against float64 and records the error.

    Where `exact` is NaN nothing is asked of the result. roundings: of its dtype, on the way to the result.
    """

    def compare(
        kernel: str, found: Tensor, exact: Tensor, *, roundings: float = 1.0, dtype: torch.dtype | None = None
    ) -> None:
        error = relative_error(found, exact)
        bound = bound_of(dtype or found.dtype, roundings)
        name = f"{kernel}, {str(dtype or found.dtype).removeprefix('torch.')}"
        record_property(f"error: {name}", f"{error:.4g} {bound:.4g}")
        assert not math.isnan(error) and error <= bound, f"{kernel}: off by {error:.3g}, at most {bound:.3g}"

    return compare
