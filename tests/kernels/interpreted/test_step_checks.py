"""The checks of `tenon doctor` find the fused kernels right, and would find them wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from tenon.kernels import low_rank, step_checks
from tenon.kernels.attention_checks import largest_error
from tenon.kernels.low_rank_table import site_table

CHECKS = {
    name.removesuffix("_error"): getattr(step_checks, name)
    for name in dir(step_checks)
    if name.endswith("_error") and name != "largest_error"
}


def test_every_kernel_of_a_step_has_a_check() -> None:
    assert len(CHECKS) == 12


@pytest.mark.parametrize("name", CHECKS)
def test_right_kernels_are_found_right(name: str, device: torch.device) -> None:
    """In fp32, where nothing is rounded away: the interpreter cannot judge bf16."""
    check: Callable[[torch.device], float] = partial(CHECKS[name], dtype=torch.float32)
    assert check(device) < 1e-5


def test_a_term_that_is_left_out_is_an_error(device: torch.device) -> None:
    """What the checks compare differs by far more than their bound when a slot's scale is wrong."""
    both = step_checks._slots(80, (48, 16, 16), device, torch.float32)
    x_TD = torch.randn(140, 80, generator=torch.Generator().manual_seed(0)).to(device)
    half = replace(both.fused, table_SF=site_table([part.group for part in both.fused.parts][::-1], device))
    found, wanted = low_rank.project(x_TD, half), low_rank.project(x_TD.double(), both.plain)
    assert found is not None and wanted is not None
    assert largest_error([step_checks._known(both, found)], [step_checks._known(both, wanted)]) > 0.1
