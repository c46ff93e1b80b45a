"""Whether a driver will do for a torch: by CUDA's major versions."""

from __future__ import annotations

import pytest

from tenon.plan.driver import driver_problem


@pytest.mark.parametrize(
    ("driver_cuda", "torch_cuda"),
    [("13.0", "13.0"), ("13.0", "12.8"), ("12.2", "12.8"), ("12.8", "12.6"), ("", "13.0"), ("12.4", ""), ("", "")],
)
def test_drivers_that_do(driver_cuda: str, torch_cuda: str) -> None:
    assert driver_problem("555.42", driver_cuda, torch_cuda) is None


@pytest.mark.parametrize(
    ("driver_cuda", "torch_cuda", "wanted"),
    [("12.8", "13.0", "580.65.06"), ("11.4", "12.6", "525.60.13"), ("13.1", "14.0", "a driver that speaks CUDA 14")],
)
def test_a_driver_that_is_too_old_is_one_clear_line(driver_cuda: str, torch_cuda: str, wanted: str) -> None:
    problem = driver_problem("535.104.05", driver_cuda, torch_cuda)
    assert problem is not None and problem.code == "plan-driver"
    assert "535.104.05" in problem.what and torch_cuda in problem.what
    assert wanted in problem.hint and f"torch build for CUDA {driver_cuda.partition('.')[0]}.x" in problem.hint
