"""Weights laid out for a CPU's products: the same map, whose rows have the same bits whatever shares the product."""

from __future__ import annotations

import pytest
import torch

from tenon.batch import NO_SLOT
from tenon.infer.generate import generate
from tenon.infer.requests import Request
from tenon.models.frozen import DenseLinear
from tenon.models.frozen_formats import make_frozen
from tenon.models.frozen_packed import PackedLinear, can_pack, packed, padded_rows
from tests.tiny import CPU, tiny_decoder

SHAPES = [(960, 576), (5, 33), (576, 1536), (256, 8192)]

pytestmark = pytest.mark.skipif(
    not can_pack(torch.zeros(1, 1)), reason="this build of torch has no packed products for this processor"
)


def dense(outputs: int, inputs: int, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> DenseLinear:
    torch.manual_seed(outputs)
    linear = make_frozen("dense", outputs, inputs, bias=bias, dtype=dtype, device=CPU)
    assert isinstance(linear, DenseLinear)
    linear.put(0, torch.randn(outputs, inputs) * inputs**-0.5)
    if linear.bias_O is not None:
        linear.bias_O.copy_(torch.linspace(-1, 1, outputs))
    return linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_it_is_the_same_map(outputs: int, inputs: int, bias: bool) -> None:
    plain = dense(outputs, inputs, bias=bias)
    other = packed(plain)
    assert isinstance(other, PackedLinear) and (other.outputs, other.inputs) == (outputs, inputs)
    assert other.size_bytes == plain.size_bytes
    for rows in (0, 1, 2, 17):
        x, dy = torch.randn(rows, inputs), torch.randn(rows, outputs)
        exact = x.double() @ plain.weight_OD.double().t() + (0 if plain.bias_O is None else plain.bias_O.double())
        torch.testing.assert_close(other.apply(x).double(), exact, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(other.apply_transposed(dy), plain.apply_transposed(dy), atol=1e-5, rtol=1e-5)
    wide = torch.randn(3, inputs + 7)
    assert torch.equal(other.apply(wide[:, 2 : 2 + inputs]), other.apply(wide[:, 2 : 2 + inputs].contiguous()))


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_p33_a_row_has_the_same_bits_alone_and_beside_others(outputs: int, inputs: int) -> None:
    linear, x = packed(dense(outputs, inputs)), torch.randn(70, inputs)
    together = linear.apply(x)
    for rows in (1, 2, 7, 16, 33):
        assert torch.equal(linear.apply(x[:rows]), together[:rows]), rows


def test_products_have_few_numbers_of_rows() -> None:
    sizes = {rows: padded_rows(rows) for rows in range(1, 257)}
    assert all(rows <= size <= max(rows + 1, 1.25 * rows) for rows, size in sizes.items())
    assert len(set(sizes.values())) == 15 + 12 + 12 and padded_rows(2049) == 2112


def test_weights_go_in_and_come_out() -> None:
    plain = dense(12, 33)
    other = packed(plain)
    other.put(4, torch.ones(3, 33))
    plain.put(4, torch.ones(3, 33))
    assert torch.equal(other.dense(0, 12), plain.weight_OD) and torch.equal(other.dense(3, 6), plain.dense(3, 6))
    moved = other.moved(lambda tensor: 2 * tensor)
    assert torch.equal(moved.dense(0, 12), 2 * plain.weight_OD) and torch.equal(other.dense(0, 12), plain.weight_OD)
    assert moved.bias_O is not None and plain.bias_O is not None and torch.equal(moved.bias_O, 2 * plain.bias_O)


def test_what_cannot_be_packed_stays_as_it_is() -> None:
    half, eight = (
        dense(8, 16, dtype=torch.bfloat16),
        make_frozen("int8", 8, 16, bias=False, dtype=torch.float32, device=CPU),
    )
    assert packed(half) is half and packed(eight) is eight


def test_p33_a_packed_decoder_answers_as_before() -> None:
    plain, other = tiny_decoder(), tiny_decoder()
    named = plain.named_tensors()
    other.load_tensors(named.items())
    other.pack()
    assert all(torch.equal(tensor, named[name]) for name, tensor in other.named_tensors().items())
    asked = [Request(list(range(3, 3 + n)), slot=NO_SLOT, max_new_tokens=12) for n in (1, 4, 9)]
    for found, expected in zip(generate(other, None, asked), generate(plain, None, asked), strict=True):
        assert found.ids == expected.ids
        torch.testing.assert_close(torch.tensor(found.logprobs), torch.tensor(expected.logprobs), atol=1e-5, rtol=0)
