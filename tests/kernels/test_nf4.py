"""nf4: equal to bitsandbytes bit for bit, both ways; the format's own arithmetic at awkward sizes.

bitsandbytes rounds alike on every device but for one thing: since 0.50 its CPU code finds the code of an absmax through
a table of 65,536 cells, and so takes a neighbour where the value lies within a cell of the middle between two codes.
Its GPU code, and ours, take the nearest.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tenon.kernels import nf4
from tenon.kernels.nf4 import NestedAbsmax, Nf4Weight

CPU = torch.device("cpu")
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 64), (3, 64), (100, 192), (257, 100), (1000, 640)]
# How far from the middle between two codes a value may lie and get the other one.
CELL = {"cpu": 2.0**-15, "cuda": 1e-6}


@pytest.fixture(scope="module")
def bnb() -> Any:
    """bitsandbytes' functions."""
    return pytest.importorskip(
        "bitsandbytes.functional",
        reason="bitsandbytes is not installed: pip install bitsandbytes",
        exc_type=ImportError,
    )


def weight(shape: tuple[int, int], dtype: torch.dtype, device: str, *, heavy: bool = False) -> Tensor:
    """Normal values; heavy: with outliers, and a row of zeros where there are several."""
    torch.manual_seed(0)
    values = torch.distributions.StudentT(torch.tensor(2.0)).sample(shape) if heavy else torch.randn(shape)
    if heavy:
        values[1:2] = 0
    return (values * 0.02).to(device, dtype)


def ours(packed: Tensor, state: Any) -> Nf4Weight:
    """The same weight in our words."""
    nested = NestedAbsmax(state.state2.code, state.state2.absmax, state.offset) if state.nested else None
    return Nf4Weight(tuple(state.shape), packed.view(-1), state.absmax, nested, nf4.levels(packed.device))


def tie_distance(quantised: Nf4Weight, plain: Nf4Weight, other_B: Tensor) -> Tensor:
    """How far the values whose codes differ lie from the middle between their two codes, as shares of the block."""
    nested = quantised.nested
    assert nested is not None
    which = (quantised.absmax_B != other_B).nonzero()[:, 0]
    scaled = (plain.absmax_B - nested.offset)[which] / nested.absmax_C[which // nf4.NESTED_BLOCK]
    middle = (nested.map_256[quantised.absmax_B[which].long()] + nested.map_256[other_B[which].long()]) / 2
    return (scaled - middle).abs()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantised_as_bitsandbytes_does(
    shape: tuple[int, int], dtype: torch.dtype, heavy: bool, device: str, bnb: Any
) -> None:
    w = weight(shape, dtype, device, heavy=heavy)
    packed, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    quantised, plain = nf4.quantise(w), nf4.quantise(w, nested=False)
    assert quantised.nested is not None
    # The codes of a block of zeros are free; bitsandbytes' CPU and GPU code choose differently.
    told_N = (plain.absmax_B > 0).repeat_interleave(32)[: len(quantised.packed_N)]
    assert torch.equal(quantised.packed_N[told_N], packed.view(-1)[told_N])
    assert torch.equal(quantised.nested.map_256, state.state2.code)
    assert torch.equal(quantised.nested.offset, state.offset)
    assert torch.equal(quantised.nested.absmax_C, state.state2.absmax)
    distance = tie_distance(quantised, plain, state.absmax)
    assert len(distance) <= 2 + 0.01 * len(state.absmax) and bool((distance < CELL[device]).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_absmax_themselves_are_bitsandbytes(shape: tuple[int, int], device: str, bnb: Any) -> None:
    """Without double quantisation nothing at all may differ."""
    w = weight(shape, torch.bfloat16, device)
    packed, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=False)
    quantised = nf4.quantise(w, nested=False)
    assert torch.equal(quantised.packed_N, packed.view(-1)) and torch.equal(quantised.absmax_B, state.absmax)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantised_as_bitsandbytes_does(
    shape: tuple[int, int], dtype: torch.dtype, double: bool, device: str, bnb: Any
) -> None:
    packed, state = bnb.quantize_4bit(
        weight(shape, dtype, device, heavy=True), quant_type="nf4", compress_statistics=double
    )
    out_OD = torch.full(shape, float("nan"), dtype=dtype, device=device)
    nf4.dequantise(ours(packed, state), out_OD)
    assert torch.equal(out_OD, bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitsandbytes_reads_what_we_quantised(dtype: torch.dtype, bnb: Any) -> None:
    w = weight((100, 192), dtype, "cpu")
    quantised, (packed, state) = nf4.quantise(w), bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    assert quantised.nested is not None and packed.view(-1).shape == quantised.packed_N.shape
    state.absmax, state.state2.absmax, state.offset = (
        quantised.absmax_B,
        quantised.nested.absmax_C,
        quantised.nested.offset,
    )
    read = bnb.dequantize_4bit(quantised.packed_N[:, None], state)
    assert torch.equal(read, nf4.dequantise_reference(quantised).to(dtype))


def test_levels_and_codes_by_hand() -> None:
    """Levels times any absmax come back as they were; the earlier code is in the high half of a byte."""
    block = torch.tensor(nf4.LEVELS).repeat(4) * 0.5
    quantised = nf4.quantise(block.view(2, 32), nested=False)
    assert quantised.packed_N.tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF] * 4
    assert quantised.absmax_B.tolist() == [0.5]
    assert torch.equal(nf4.dequantise_reference(quantised), block.view(2, 32))


def test_the_dynamic_map() -> None:
    values = nf4.dynamic_map(CPU)
    assert values.shape == (256,) and bool((values[1:] > values[:-1]).all())
    assert values[-1] == 1.0 and values[127] == 0.0
    assert values[0].item() == pytest.approx(-0.99296875)
    torch.testing.assert_close(values[:127], -values[128:255].flip(0))


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 100), (300, 64)])
def test_what_comes_back_is_near(shape: tuple[int, int]) -> None:
    """Half a step between levels, at the most, of the block's absmax; and its error through the nested codes."""
    w = weight(shape, torch.float32, "cpu", heavy=True)
    exact, double = nf4.quantise(w, nested=False), nf4.quantise(w)
    largest = exact.absmax_B.repeat_interleave(64)[: w.numel()].view(shape)
    assert bool(((nf4.dequantise_reference(exact) - w).abs() <= 0.1520 * largest + 1e-9).all())
    assert double.nested is not None
    nested_B = double.nested.absmax_C.repeat_interleave(256)[: len(exact.absmax_B)]
    share = (nf4.absmax(double) - exact.absmax_B).abs() / nested_B.clamp(min=1e-30)
    assert bool((share < 0.0075).all())


def test_a_large_weight_is_quantised_in_pieces_as_a_whole() -> None:
    w = weight((520, 64 * 256), torch.bfloat16, "cpu")
    assert w.numel() > nf4.PIECE
    quantised = nf4.quantise(w)
    rows = nf4.quantise(w[512:])
    assert torch.equal(quantised.packed_N[512 * 64 * 128 :], rows.packed_N)


def test_the_largest_of_a_row_is_its_scale() -> None:
    for shape in ((4, 128), (6, 100)):
        quantised = nf4.quantise(weight(shape, torch.float32, "cpu"))
        wanted = nf4.dequantise_reference(quantised).abs().amax(dim=1)
        torch.testing.assert_close(nf4.row_amax(quantised), wanted, rtol=0, atol=0)


def test_bytes_a_weight() -> None:
    quantised = nf4.quantise(weight((1024, 1024), torch.bfloat16, "cpu"))
    assert 8 * quantised.size_bytes / 1024**2 == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)
