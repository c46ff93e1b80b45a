"""How a check went, as the doctor's states say it."""

from __future__ import annotations

import pytest

from tenon.kernels.checks import CheckOutcome, KernelCheck
from tenon.pipeline.doctor import state_of


@pytest.mark.parametrize(
    ("outcome", "state"),
    [
        (CheckOutcome(0.01, "", 0.1), "works"),
        (CheckOutcome(0.03, "", 0.1), "wrong"),
        (CheckOutcome(float("inf"), "", 0.1), "wrong"),
        (CheckOutcome(None, "RuntimeError: no plan", 0.1), "fails"),
        (CheckOutcome(None, "it needs a newer GPU", 0.1, ran=False), "unavailable"),
    ],
)
def test_the_state_of_an_outcome(outcome: CheckOutcome, state: str) -> None:
    assert state_of(KernelCheck("x", "cuda", lambda _device: 0.0, 0.02), outcome) == state
