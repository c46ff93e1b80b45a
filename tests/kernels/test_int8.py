"""int8 rows: half a step of a row's scale at the most, and exact at its ends."""

from __future__ import annotations

import pytest
import torch

from tenon.kernels import int8

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (5, 33), (3, 5000)])
def test_rows_are_near_and_as_the_reference(shape: tuple[int, int], device: str) -> None:
    torch.manual_seed(0)
    w_OD = torch.randn(shape)
    w_OD[2:3] = 0
    on_cpu, w_OD = int8.quantise_rows(w_OD), w_OD.to(device)
    rows = int8.quantise_rows(w_OD)
    assert torch.equal(rows.values_OD.cpu(), on_cpu.values_OD) and torch.equal(rows.scale_O.cpu(), on_cpu.scale_O)
    for dtype in (torch.float32, torch.bfloat16):
        back_OD = int8.dequantise_rows(rows, dtype)
        assert torch.equal(back_OD, int8.dequantise_rows_reference(rows, dtype)) and back_OD.dtype == dtype
    back_OD = int8.dequantise_rows(rows, torch.float32)
    assert bool(((back_OD - w_OD).abs() <= 0.5001 * rows.scale_O[:, None]).all())
    assert not len(w_OD) or rows.values_OD.abs().amax(dim=1)[0] == 127
