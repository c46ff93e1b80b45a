"""Frozen maps of every format: both products against the weight that they keep, and against the one that was put."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tenon.kernels import fp8, nf4
from tenon.models.frozen import DenseLinear, FrozenKind, FrozenLinear
from tenon.models.frozen_formats import make_frozen

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
# (kind, whether nf4 computes in fp8, the relative error of one product that the format may have)
FORMATS: list[tuple[FrozenKind, bool, float]] = [
    ("dense", False, 1e-6),
    ("fp8", False, 0.04),
    ("int8", False, 0.01),
    ("nf4", False, 0.11),
    ("nf4", True, 0.12),
]


def weights(modules: tuple[int, ...], inputs: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(outputs, inputs) * 0.02 for outputs in modules]


def frozen(
    kind: FrozenKind,
    modules: list[Tensor],
    *,
    compute_fp8: bool,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> FrozenLinear:
    """The modules stacked, with a bias."""
    outputs, inputs = sum(map(len, modules)), modules[0].shape[1]
    linear = make_frozen(
        kind, outputs, inputs, bias=True, dtype=dtype, device=torch.device(device), compute_fp8=compute_fp8
    )
    start = 0
    for module in modules:
        linear.put(start, module)
        start += len(module)
    assert linear.bias_O is not None
    linear.bias_O.copy_(torch.linspace(-1, 1, outputs))
    return linear


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(("kind", "compute_fp8", "bound"), FORMATS)
@pytest.mark.parametrize(("modules", "inputs"), [((32, 16, 16), 64), ((5, 3), 33), ((70,), 192)])
def test_both_products(
    kind: FrozenKind, compute_fp8: bool, bound: float, modules: tuple[int, ...], inputs: int
) -> None:
    parts = weights(modules, inputs)
    linear, whole = frozen(kind, parts, compute_fp8=compute_fp8), torch.cat(parts)
    x_TD, dy_TO = torch.randn(9, inputs), torch.randn(9, len(whole))
    assert linear.bias_O is not None
    assert error(linear.apply(x_TD), x_TD @ whole.t() + linear.bias_O) < bound
    assert error(linear.apply_transposed(dy_TO), dy_TO @ whole) < bound
    assert error(linear.dense(0, len(whole)), whole) < bound


@pytest.mark.parametrize(("kind", "compute_fp8"), [("int8", False), ("nf4", False)])
def test_formats_without_fp8_multiply_exactly_what_they_keep(kind: FrozenKind, compute_fp8: bool) -> None:
    linear = frozen(kind, weights((32, 16), 64), compute_fp8=compute_fp8)
    kept, x_TD, dy_TO = linear.dense(0, 48), torch.randn(5, 64), torch.randn(5, 48)
    assert torch.equal(linear.apply(x_TD), torch.nn.functional.linear(x_TD, kept, linear.bias_O))
    assert torch.equal(linear.apply_transposed(dy_TO), dy_TO @ kept)


@pytest.mark.parametrize(("kind", "compute_fp8"), [("fp8", False), ("nf4", True)])
@pytest.mark.parametrize("inputs", [64, 192, 33])
def test_one_set_of_fp8_values_serves_both_products(kind: FrozenKind, compute_fp8: bool, inputs: int) -> None:
    """Forward: (x8 s_x) (V s_o)^T. dgrad: ((dy s_o)8 s_dy) V. In float64, from the very same values."""
    linear = frozen(kind, weights((32, 16), inputs), compute_fp8=compute_fp8, dtype=torch.float64)
    scale_O, x_TD, dy_TO = linear.output_scale_O, torch.randn(5, inputs).double(), torch.randn(5, 48).double()
    assert scale_O is not None and linear.takes_fp8 and linear.bias_O is not None
    probe = torch.eye(48).double()
    kept_OD = linear.apply_transposed(probe, fp8.Fp8Rows(probe.to(fp8.FP8_DTYPE), scale_O.clone()))
    x = fp8.quantise_rows(x_TD)
    y_TO = fp8.dequantise_rows(x, torch.float64) @ kept_OD.t() + linear.bias_O
    torch.testing.assert_close(linear.apply(x_TD), y_TO, rtol=0, atol=1e-6)
    torch.testing.assert_close(linear.apply(x_TD, x), linear.apply(x_TD))
    dy = fp8.quantise_rows(dy_TO, scale_O)
    dx_TD = fp8.dequantise_rows(dy, torch.float64) @ (kept_OD / scale_O.double()[:, None])
    torch.testing.assert_close(linear.apply_transposed(dy_TO), dx_TD, rtol=0, atol=1e-6)
    torch.testing.assert_close(linear.apply_transposed(dy_TO, dy), linear.apply_transposed(dy_TO))


@pytest.mark.parametrize(("kind", "compute_fp8", "bound"), FORMATS)
def test_rows_of_the_stack_are_what_was_put_there(kind: FrozenKind, compute_fp8: bool, bound: float) -> None:
    """Modules of a stack are quantised alone: the rows of one are the same whatever stands beside it."""
    parts = weights((32, 16, 24), 64)
    linear, alone = frozen(kind, parts, compute_fp8=compute_fp8), frozen(kind, parts[1:2], compute_fp8=compute_fp8)
    assert torch.equal(linear.dense(32, 48), alone.dense(0, 16))
    torch.testing.assert_close(linear.dense(20, 60), linear.dense(0, 72)[20:60], rtol=0, atol=0)
    torch.testing.assert_close(linear.dense(50, 51), linear.dense(0, 72)[50:51], rtol=0, atol=0)


def test_bytes_kept() -> None:
    part = weights((256,), 256)
    count = 256 * 256
    kept = {(kind, compute): frozen(kind, part, compute_fp8=compute).size_bytes / count for kind, compute, _ in FORMATS}
    assert kept["dense", False] == 4
    assert kept["fp8", False] == pytest.approx(1, abs=0.04)  # the transposed copy is for GPUs alone
    assert kept["int8", False] == pytest.approx(1, abs=0.02)
    assert kept["nf4", False] == pytest.approx(0.516, abs=0.001)
    assert kept["nf4", True] == pytest.approx(0.516, abs=0.06)


@pytest.mark.parametrize(("kind", "compute_fp8", "bound"), FORMATS)
def test_a_weight_that_is_nf4_already(kind: FrozenKind, compute_fp8: bool, bound: float) -> None:
    """nf4 keeps it bit for bit; other formats quantise what it says."""
    (part,) = weights((32,), 64)
    quantised = nf4.quantise(part)
    linear = make_frozen(
        kind, 32, 64, bias=False, dtype=torch.float32, device=torch.device("cpu"), compute_fp8=compute_fp8
    )
    linear.put(0, quantised)
    wanted = nf4.dequantise_reference(quantised)
    assert error(linear.dense(0, 32), wanted) < (1e-12 if kind in ("dense", "nf4") else bound)


def test_no_tokens() -> None:
    for kind, compute_fp8, _ in FORMATS:
        linear = frozen(kind, weights((32,), 64), compute_fp8=compute_fp8)
        assert linear.apply(torch.empty(0, 64)).shape == (0, 32)
        assert linear.apply_transposed(torch.empty(0, 32)).shape == (0, 64)


def test_dense_rows_are_views_of_the_weight() -> None:
    linear = make_frozen("dense", 8, 4, bias=False, dtype=torch.float32, device=torch.device("cpu"))
    assert isinstance(linear, DenseLinear) and linear.bias_O is None
    linear.dense(2, 4).fill_(7)
    assert bool((linear.weight_OD[2:4] == 7).all())


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "compute_fp8", "bound"), FORMATS)
@pytest.mark.parametrize(("modules", "inputs"), [((512, 128, 128), 576), ((48, 80), 64), ((5, 3), 33), ((33,), 128)])
def test_the_gpu_multiplies_as_the_cpu_does(
    kind: FrozenKind, compute_fp8: bool, bound: float, modules: tuple[int, ...], inputs: int
) -> None:
    parts = weights(modules, inputs)
    there = frozen(kind, parts, compute_fp8=compute_fp8, dtype=torch.bfloat16, device="cuda")
    here = frozen(kind, parts, compute_fp8=compute_fp8, dtype=torch.bfloat16)
    x_TD, dy_TO = torch.randn(77, inputs).bfloat16(), torch.randn(77, sum(modules)).bfloat16()
    # The mean absmax of nf4 is summed in another order there.
    assert error(there.dense(0, sum(modules)).cpu(), here.dense(0, sum(modules))) < (1e-3 if kind == "nf4" else 1e-12)
    assert error(there.apply(x_TD.cuda()).cpu(), here.apply(x_TD)) < 5e-3
    assert error(there.apply_transposed(dy_TO.cuda()).cpu(), here.apply_transposed(dy_TO)) < 5e-3


@pytest.mark.gpu
def test_fp8_kept_once_is_fp8_kept_twice() -> None:
    torch.manual_seed(0)
    weight, dy_TO, device = torch.randn(272, 144), torch.randn(50, 272).bfloat16().cuda(), torch.device("cuda")
    gradients, sizes = [], []
    for twice in (True, False):
        linear = make_frozen("fp8", 272, 144, bias=False, dtype=torch.bfloat16, device=device, fp8_twice=twice)
        linear.put(0, weight)
        gradients.append(linear.apply_transposed(dy_TO))
        sizes.append(linear.size_bytes)
    assert torch.equal(*gradients)
    assert sizes[0] - sizes[1] == 272 * 144


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(28_672, 4_096), (4_096, 14_336), (6_144, 4_096)])
def test_large_weights_dequantise_alike_both_ways(shape: tuple[int, int]) -> None:
    """The sizes of an 8B model, where offsets and grids are large: the transposed fp8 values are the straight ones."""
    torch.manual_seed(0)
    linear = make_frozen("nf4", *shape, bias=False, dtype=torch.bfloat16, device=torch.device("cuda"), compute_fp8=True)
    linear.put(0, torch.randn(shape, dtype=torch.bfloat16, device="cuda") * 0.02)
    assert linear.output_scale_O is not None
    probe = torch.zeros(16, shape[0], dtype=torch.bfloat16, device="cuda")
    probe[torch.arange(16), torch.arange(16) * (shape[0] // 16) + 7] = 1
    rows = linear.apply_transposed(probe)
    wanted = linear.dense(0, shape[0])[torch.arange(16) * (shape[0] // 16) + 7]
    assert error(rows, wanted) < 0.04
