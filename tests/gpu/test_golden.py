"""Twenty steps give the same bits twice, learn, and are those that are known for this kind of GPU."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch

from tests.gpu.golden import RUNS, STEPS, golden_file, golden_run, versions
from tests.gpu.kit import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter has no bf16")
# With another torch or Triton, sums may be made in another order.
NEAR = 2e-2


@cache
def first(name: str, device: torch.device) -> dict[str, Any]:
    return golden_run(RUNS[name], device)


@pytest.mark.parametrize("name", RUNS)
def test_twenty_steps_give_the_same_bits_twice_and_learn(name: str, device: torch.device) -> None:
    one, two = first(name, device), golden_run(RUNS[name], device)
    assert one == two
    assert len(one["losses"]) == STEPS
    for losses in zip(*one["losses"], strict=True):
        assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("name", RUNS)
def test_twenty_steps_are_those_known_for_this_gpu(name: str, device: torch.device) -> None:
    path = golden_file()
    if not path.is_file():
        pytest.skip(f"nothing is known of this GPU: `python -m tests.gpu.golden` writes {path.name}")
    known = json.loads(path.read_text(encoding="utf-8"))
    found = first(name, device)
    if known["versions"] == versions():
        assert found == known["runs"][name], "if the arithmetic was meant to change: python -m tests.gpu.golden"
    for mine, theirs in zip(found["losses"], known["runs"][name]["losses"], strict=True):
        assert mine == pytest.approx(theirs, rel=NEAR)
