"""fp8 rows: the format's bounds, folded columns, rows of zeros and of what is not finite; products against float64."""

from __future__ import annotations

import pytest
import torch

from tenon.kernels import fp8
from tenon.kernels.fp8 import Fp8Rows

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 16), (1, 1), (5, 48), (33, 300), (3, 40_000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_near_and_as_the_reference(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    x_TD = (torch.randn(shape) * torch.rand(shape[0], 1) * 1e-3).to(device, dtype)
    scale_D = torch.rand(shape[1], device=device) * 1e-4
    for columns in (None, scale_D):
        rows, wanted = fp8.quantise_rows(x_TD, columns), fp8.quantise_rows_reference(x_TD, columns)
        assert torch.equal(rows.scale_T, wanted.scale_T)
        assert torch.equal(rows.values_TD.float(), wanted.values_TD.float())
        exact = x_TD.double() if columns is None else x_TD.double() * columns.double()
        # Three bits behind the leading one: half of the last is 2^-4; below 2^-6 of E4M3 the steps are all 2^-9.
        back, smallest = fp8.dequantise_rows(rows, torch.float32).double(), 2.0**-10 * rows.scale_T.double()[:, None]
        assert bool(((back - exact).abs() <= 2.0**-4 * 1.0001 * exact.abs() + smallest).all())


@pytest.mark.parametrize("device", DEVICES)
def test_scales_are_quotients_rounded_once(device: str) -> None:
    """Beside a Python number torch would multiply with a reciprocal, on a GPU or everywhere."""
    torch.manual_seed(0)
    amax_T = torch.rand(10_000) * 1e-3
    for largest in (fp8.FP8_MAX, 127.0):
        scale_T, inverse_T = fp8.row_scales(amax_T.to(device), largest)
        assert torch.equal(scale_T.cpu(), (amax_T.double() / largest).float())
        assert torch.equal(inverse_T.cpu(), (torch.tensor(largest).double() / amax_T.double()).float())


def test_rows_of_zeros_small_rows_and_rows_that_are_not_finite() -> None:
    x_TD = torch.tensor([[0.0, 0.0], [1e-20, -2e-20], [1.0, float("nan")], [1.0, float("inf")]])
    back = fp8.dequantise_rows(fp8.quantise_rows(x_TD), torch.float32)
    assert back[0].tolist() == [0.0, 0.0]
    torch.testing.assert_close(back[1], x_TD[1], rtol=2**-4, atol=0)
    assert not back[2].isfinite().all() and not back[3].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 16), (1, 1), (5, 48), (130, 257)])
def test_transposed_bytes(shape: tuple[int, int], device: str) -> None:
    rows = fp8.quantise_rows(torch.randn(shape, device=device))
    turned = fp8.transposed(rows.values_TD)
    assert turned.is_contiguous() and torch.equal(turned.float(), rows.values_TD.float().t())


def test_the_reference_product() -> None:
    torch.manual_seed(0)
    x, w, bias_O = fp8.quantise_rows(torch.randn(7, 33)), fp8.quantise_rows(torch.randn(5, 33)), torch.randn(5)
    exact = fp8.dequantise_rows(x, torch.float64) @ fp8.dequantise_rows(w, torch.float64).t() + bias_O.double()
    torch.testing.assert_close(fp8.product_reference(x, w, bias_O, torch.float64), exact)
    torch.testing.assert_close(fp8.product_reference(x, w, bias_O, torch.float32), exact.float())


@pytest.mark.gpu
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(0, 16, 16), (1, 16, 32), (77, 528, 1040), (256, 4096, 512)])
def test_the_product_of_the_tensor_cores(tokens: int, inputs: int, outputs: int, biased: bool, fast: bool) -> None:
    device = torch.device("cuda")
    if not fp8.multiplies_fp8(device, outputs, inputs):
        pytest.skip("this GPU has no fp8")
    torch.manual_seed(0)
    x = fp8.quantise_rows(torch.randn(tokens, inputs, device=device))
    w = fp8.quantise_rows(torch.randn(outputs, inputs, device=device))
    bias_O = torch.randn(outputs, device=device, dtype=torch.bfloat16) if biased else None
    exact = fp8.product_reference(x, w, bias_O, torch.float64)
    y_TO = fp8.product(x, w, bias_O, torch.bfloat16, fast=fast).double()
    assert y_TO.shape == (tokens, outputs)
    assert not tokens or (y_TO - exact).norm() / exact.norm() < 5e-3


def test_only_whole_sixteens_on_a_gpu_are_multiplied_in_fp8() -> None:
    assert not fp8.multiplies_fp8(torch.device("cpu"), 32, 32)
    assert isinstance(fp8.quantise_rows(torch.ones(1, 3)), Fp8Rows)
