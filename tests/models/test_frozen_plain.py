"""Quantised maps in plain torch: the products of the maps themselves on a CPU; wrong products are told from right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tenon.kernels.fp8 import Fp8Rows
from tenon.models.frozen import DenseLinear, FrozenKind, FrozenLinear
from tenon.models.frozen_formats import Nf4Linear, make_frozen
from tenon.models.frozen_plain import PlainLinear, plain_linear, product_error
from tests.tiny import CPU

KINDS: list[tuple[FrozenKind, bool]] = [("fp8", False), ("int8", False), ("nf4", False), ("nf4", True)]


def filled(linear: FrozenLinear) -> FrozenLinear:
    """Two modules, the second one wider than the first."""
    generator = torch.Generator().manual_seed(0)
    for start, stop in ((0, 16), (16, linear.outputs)):
        linear.put(start, torch.randn(stop - start, linear.inputs, generator=generator) * 0.1)
    if linear.bias_O is not None:
        linear.bias_O.copy_(torch.randn(linear.outputs, generator=generator))
    return linear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kind", "compute_fp8"), KINDS)
@pytest.mark.parametrize("inputs", [40, 64])
def test_the_same_products_from_the_same_bytes(inputs: int, kind: FrozenKind, compute_fp8: bool, bias: bool) -> None:
    linear = filled(make_frozen(kind, 48, inputs, bias=bias, dtype=torch.float32, device=CPU, compute_fp8=compute_fp8))
    plain = plain_linear(linear)
    x_TD, dy_TO = torch.randn(5, inputs), torch.randn(5, 48)
    torch.testing.assert_close(plain.apply(x_TD), linear.apply(x_TD))
    torch.testing.assert_close(plain.apply_transposed(dy_TO), linear.apply_transposed(dy_TO))
    assert torch.equal(plain.dense(16, 48), linear.dense(16, 48)) and plain.size_bytes == linear.size_bytes
    assert product_error(linear, torch.float32, CPU) < 1e-5
    there = plain.moved(lambda tensor: tensor.clone())
    assert isinstance(there, PlainLinear) and torch.equal(there.apply(x_TD), plain.apply(x_TD))
    assert not plain.takes_fp8 and plain.output_scale_O is None


class Off(Nf4Linear):
    """Products that are a little too large, one way or the other."""

    forward, back = 1.0, 1.0

    def apply(self, x_TD: Tensor, quantised: Fp8Rows | None = None) -> Tensor:
        return super().apply(x_TD, quantised) * self.forward

    def apply_transposed(self, dy_TO: Tensor, quantised: Fp8Rows | None = None) -> Tensor:
        return super().apply_transposed(dy_TO, quantised) * self.back


@pytest.mark.parametrize(("forward", "back", "least"), [(1.1, 1.0, 0.09), (1.0, 0.9, 0.09), (float("nan"), 1.0, 1e9)])
def test_wrong_products_are_told(forward: float, back: float, least: float) -> None:
    linear = Off(48, 64, bias_O=None, dtype=torch.float32, device=CPU)
    linear.forward, linear.back = forward, back
    filled(linear)
    assert product_error(linear, torch.float32, CPU) > least
    assert product_error(plain_linear(linear), torch.float32, CPU) == 0.0


def test_dense_is_plain_already() -> None:
    linear = filled(make_frozen("dense", 48, 64, bias=False, dtype=torch.float32, device=CPU))
    assert isinstance(linear, DenseLinear) and plain_linear(linear) is linear
    wrapped = plain_linear(filled(make_frozen("int8", 48, 64, bias=False, dtype=torch.float32, device=CPU)))
    assert plain_linear(wrapped) is wrapped
