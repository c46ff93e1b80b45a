"""The kernels of nf4, fp8 and int8 against their references, to the bit, at awkward sizes, into poisoned memory.

Every kernel writes any float dtype: fp32 results show the arithmetic exactly; on a GPU the narrow ones are exact too.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tenon.kernels import fp8, fp8_triton, frozen_checks, int8, int8_triton, nf4, nf4_triton

NARROW = (torch.bfloat16, torch.float16)


def weight(shape: tuple[int, int], device: torch.device, *, seed: int = 0) -> Tensor:
    """Values of many sizes, a row of zeros where there are several."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)
    values[1:2] = 0
    return values.to(device)


def poisoned(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, float("nan"), device=device).to(dtype)


def same(got: Tensor, wanted: Tensor) -> bool:
    return torch.equal(got.float(), wanted.float())


def outputs(rounds: bool, *, fp8_too: bool) -> tuple[torch.dtype, ...]:
    return (torch.float32, *NARROW, *([fp8.FP8_DTYPE] if fp8_too else [])) if rounds else (torch.float32,)


NF4_SHAPES = [(1, 64), (3, 64), (5, 192), (130, 320), (257, 128)]


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", NF4_SHAPES)
def test_nf4_to_rows(shape: tuple[int, int], nested: bool, device: torch.device, rounds: bool) -> None:
    quantised = nf4.quantise(weight(shape, device), nested=nested)
    inverse_O = fp8.FP8_MAX / nf4.row_amax(quantised).clamp(min=fp8.SMALLEST_AMAX)
    plain, scaled = nf4.dequantise_reference(quantised), nf4.dequantise_scaled_reference(quantised, inverse_O)
    for dtype in outputs(rounds, fp8_too=False):
        out_OD = poisoned(shape, dtype, device)
        nf4_triton.dequantise(quantised, out_OD)
        assert same(out_OD, plain.to(dtype)), dtype
    for dtype in outputs(rounds, fp8_too=True):
        out_OD = poisoned(shape, dtype, device)
        nf4_triton.dequantise(quantised, out_OD, inverse_O)
        assert same(out_OD, scaled.to(dtype)), dtype
        assert bool((out_OD.float().abs() <= fp8.FP8_MAX * (1 + 1e-6)).all())


@pytest.mark.parametrize("shape", NF4_SHAPES)
def test_nf4_to_a_slice_of_the_transpose(shape: tuple[int, int], device: torch.device, rounds: bool) -> None:
    quantised = nf4.quantise(weight(shape, device))
    inverse_O = fp8.FP8_MAX / nf4.row_amax(quantised).clamp(min=fp8.SMALLEST_AMAX)
    wanted = nf4.dequantise_scaled_reference(quantised, inverse_O).t()
    for dtype in outputs(rounds, fp8_too=True):
        wide_DO = poisoned((shape[1], shape[0] + 7), dtype, device)
        nf4_triton.dequantise_transposed(quantised, wide_DO[:, 3 : 3 + shape[0]], inverse_O)
        assert same(wide_DO[:, 3 : 3 + shape[0]], wanted.to(dtype)), dtype
        assert bool(wide_DO[:, :3].isnan().all()) and bool(wide_DO[:, 3 + shape[0] :].isnan().all())


def test_bf16_differs_from_its_rounding_by_less_than_its_last_bit(device: torch.device) -> None:
    quantised = nf4.quantise(weight((9, 128), device))
    out_OD, wanted = poisoned((9, 128), torch.bfloat16, device), nf4.dequantise_reference(quantised)
    nf4_triton.dequantise(quantised, out_OD)
    torch.testing.assert_close(out_OD.float(), wanted, rtol=2**-7, atol=0)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(("shape", "longest"), [((1, 1), 512), ((5, 48), 512), ((3, 512), 512), ((4, 1300), 512)])
def test_fp8_rows(shape: tuple[int, int], longest: int, folded: bool, device: torch.device, rounds: bool) -> None:
    """The longer rows do not fit into one pass."""
    generator = torch.Generator().manual_seed(1)
    x_TD = weight(shape, device, seed=2)
    wide_TD = torch.cat((x_TD, x_TD), dim=1)[:, : shape[1]]
    scale_D = (torch.rand(shape[1], generator=generator) * 1e-6).to(device) if folded else None
    wanted = fp8.quantise_rows_reference(x_TD, scale_D)
    exact = (x_TD if scale_D is None else x_TD * scale_D) * (1.0 / wanted.scale_T)[:, None]
    for dtype in outputs(rounds, fp8_too=True):
        values_TD, scale_T = poisoned(shape, dtype, device), poisoned((1, shape[0]), torch.float32, device)[0]
        fp8_triton.quantise_rows(
            wide_TD,
            scale_D,
            values_TD,
            scale_T,
            fp8_max=fp8.FP8_MAX,
            smallest_amax=fp8.SMALLEST_AMAX,
            longest=longest,
        )
        assert torch.equal(scale_T, wanted.scale_T)
        if dtype == torch.float32:
            torch.testing.assert_close(values_TD, exact, rtol=3e-7, atol=0)
            assert same(values_TD.to(fp8.FP8_DTYPE), wanted.values_TD)
        elif dtype == fp8.FP8_DTYPE:
            assert same(values_TD, wanted.values_TD)


def test_fp8_rows_of_bf16(device: torch.device) -> None:
    x_TD = weight((6, 96), device).to(torch.bfloat16)
    values_TD, scale_T = poisoned((6, 96), torch.float32, device), poisoned((1, 6), torch.float32, device)[0]
    fp8_triton.quantise_rows(x_TD, None, values_TD, scale_T, fp8_max=fp8.FP8_MAX, smallest_amax=fp8.SMALLEST_AMAX)
    wanted = fp8.quantise_rows_reference(x_TD)
    assert torch.equal(scale_T, wanted.scale_T) and same(values_TD.to(fp8.FP8_DTYPE), wanted.values_TD)


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (129, 130), (256, 128)])
def test_bytes_are_transposed(shape: tuple[int, int], device: torch.device) -> None:
    x_TD = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
    out_DT = torch.full((shape[1], shape[0]), 77, dtype=torch.uint8, device=device)
    fp8_triton.transpose(x_TD, out_DT)
    assert torch.equal(out_DT, x_TD.t())


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (7, 2049), (2, 4096)])
def test_int8_rows(shape: tuple[int, int], device: torch.device, rounds: bool) -> None:
    rows = int8.quantise_rows(weight(shape, device))
    for dtype in outputs(rounds, fp8_too=False):
        out_OD = poisoned(shape, dtype, device)
        int8_triton.dequantise_rows(rows.values_OD, rows.scale_O, out_OD)
        assert same(out_OD, int8.dequantise_rows_reference(rows, dtype))


def test_nothing_to_do(device: torch.device) -> None:
    """Empty inputs launch nothing."""
    empty = torch.empty((0, 64), device=device)
    nf4_triton.dequantise(nf4.quantise(empty, nested=False), torch.empty((0, 64), device=device))
    fp8_triton.quantise_rows(empty, None, empty, empty[:, 0], fp8_max=fp8.FP8_MAX, smallest_amax=fp8.SMALLEST_AMAX)
    int8_triton.dequantise_rows(empty.to(torch.int8), empty[:, 0], empty)
    fp8_triton.transpose(empty.to(torch.uint8), empty.to(torch.uint8).t())


def test_the_doctor_finds_these_kernels_right(device: torch.device, rounds: bool) -> None:
    """The checks of `tenon doctor`; the interpreter cannot judge narrow results."""
    bound = 1e-5 if rounds else 0.1
    assert frozen_checks.int8_error(device) <= bound
    assert frozen_checks.nf4_error(device) <= bound
    if rounds:
        assert frozen_checks.fp8_rows_error(device) <= bound
        assert frozen_checks.nf4_fp8_error(device) <= bound
