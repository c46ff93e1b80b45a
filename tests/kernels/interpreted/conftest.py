"""Tests of Triton kernels that run in two places: on a GPU (`make test-gpu`), and in Triton's interpreter on a CPU.

The interpreter must be chosen before Triton is imported, so the ordinary suite collects nothing here: it starts one
pytest of its own with TRITON_INTERPRET=1 (`tests/kernels/test_interpreted.py`). By hand:
`TRITON_INTERPRET=1 pytest tests/kernels/interpreted`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU these are GPU tests."""
    for item in items:
        if not INTERPRETED and item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run: the CPU under the interpreter, else the GPU."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def rounds() -> bool:
    """Whether narrow results can be compared to the bit: the interpreter cuts bf16 off, and carries fp8 wrongly."""
    return not INTERPRETED
