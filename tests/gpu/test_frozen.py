"""Quantised bases at the sizes of real models: kernels to the bit, products against float64 of the same bytes."""

from __future__ import annotations

import pytest
import torch

from tenon.kernels import fp8, int8, nf4
from tenon.kernels.fp8 import Fp8Rows
from tenon.models.frozen import FrozenKind, FrozenLinear
from tenon.models.frozen_formats import make_frozen
from tests.gpu.kit import INTERPRETED, Draw, Judge, relative_error

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(INTERPRETED, reason="the interpreter has neither bf16 nor fp8"),
]
BF16, HALVES = torch.bfloat16, (torch.bfloat16, torch.float16)
# (outputs, inputs): k and v of SmolLM2, o of Qwen 2.5 0.5B, down of Llama 8B.
SIZES = [(192, 576), (896, 896), (4096, 14336)]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_dequantised_to_the_bit(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    weight_OD = Draw(shape[0], BF16, device)(*shape, scale=0.02)
    for nested in (True, False):
        packed, out_OD = nf4.quantise(weight_OD, nested=nested), torch.empty(shape, dtype=dtype, device=device)
        nf4.dequantise(packed, out_OD)
        assert torch.equal(out_OD, nf4.dequantise_reference(packed).to(dtype))
    rows = int8.quantise_rows(weight_OD)
    assert torch.equal(int8.dequantise_rows(rows, dtype), int8.dequantise_rows_reference(rows, dtype))


@pytest.mark.parametrize("tokens", [1, 65, 1003])
@pytest.mark.parametrize("width", [576, 4096, 14336, 28672])
def test_rows_in_fp8_to_the_bit(tokens: int, width: int, device: torch.device) -> None:
    if not fp8.has_fp8(device):
        pytest.skip("this GPU has no fp8")
    draw = Draw(width, BF16, device)
    x_TD, scale_D = draw(tokens, width), draw(width, dtype=torch.float32).abs() * 1e-3
    for columns in (None, scale_D):
        rows, wanted = fp8.quantise_rows(x_TD, columns), fp8.quantise_rows_reference(x_TD, columns)
        assert torch.equal(rows.scale_T, wanted.scale_T)
        assert torch.equal(rows.values_TD.view(torch.uint8), wanted.values_TD.view(torch.uint8))
    turned = fp8.transposed(rows.values_TD)
    assert torch.equal(turned.view(torch.uint8), rows.values_TD.view(torch.uint8).t())


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("tokens", [1, 63, 1003])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_products_in_fp8(shape: tuple[int, int], tokens: int, fast: bool, device: torch.device, judge: Judge) -> None:
    """Forward, and dgrad with the transposed values; the tensor cores' own registers keep about 14 bits."""
    outputs, inputs = shape
    if not fp8.multiplies_fp8(device, outputs, inputs):
        pytest.skip("this GPU has no fp8")
    draw = Draw(tokens, BF16, device)
    w = fp8.quantise_rows(draw(outputs, inputs, scale=0.02))
    x, dy = fp8.quantise_rows(draw(tokens, inputs)), fp8.quantise_rows(draw(tokens, outputs), w.scale_T)
    columns = Fp8Rows(fp8.transposed(w.values_TD), torch.ones(inputs, device=device))
    for kernel, left, right in (("fp8 product", x, w), ("fp8 product, transposed", dy, columns)):
        exact = fp8.product_reference(left, right, None, torch.float64)
        name = f"{kernel}, {'fast' if fast else 'exact'} sums"
        judge(name, fp8.product(left, right, None, BF16, fast=fast), exact, roundings=4 if fast else 2)


@pytest.mark.parametrize("compute_fp8", [False, True])
@pytest.mark.parametrize("kind", ["dense", "fp8", "int8", "nf4"])
@pytest.mark.parametrize("shape", SIZES[:2], ids=str)
def test_frozen_maps_both_ways(
    shape: tuple[int, int], kind: FrozenKind, compute_fp8: bool, device: torch.device, judge: Judge
) -> None:
    """Two modules in one map with a bias, against float64 products with what it says that it holds."""
    outputs, inputs = shape
    if kind != "nf4" and compute_fp8:
        pytest.skip("only nf4 has the choice")
    draw = Draw(outputs, BF16, device)
    linear: FrozenLinear = make_frozen(
        kind, 2 * outputs, inputs, bias=True, dtype=BF16, device=device, compute_fp8=compute_fp8
    )
    for start in (0, outputs):
        linear.put(start, draw(outputs, inputs, scale=0.05))
    assert linear.bias_O is not None
    linear.bias_O.copy_(draw(2 * outputs))
    held_OD = linear.dense(0, 2 * outputs).double()
    x_TD, dy_TO = draw(65, inputs), draw(65, 2 * outputs)
    y, dx = linear.apply(x_TD), linear.apply_transposed(dy_TO)
    exact_y, exact_dx = x_TD.double() @ held_OD.t() + linear.bias_O.double(), dy_TO.double() @ held_OD
    if linear.takes_fp8:
        # What is multiplied is rounded to E4M3, three bits behind the leading one.
        assert relative_error(y, exact_y) < 0.05 and relative_error(dx, exact_dx) < 0.05
        return
    judge(f"{kind} forward", y, exact_y, roundings=2)
    judge(f"{kind} dgrad", dx, exact_dx, roundings=2)
