"""RMS norm with the sum before it, forward and back: low-rank terms, residuals, tails for slots that ride."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tenon.kernels.fp8 import FP8_DTYPE, Fp8Rows, empty_rows, quantise_rows_reference
from tenon.kernels.low_rank import Addend, Sum
from tenon.kernels.rms_norm import Quantised, add_norm, add_norm_backward
from tests.gpu.kit import (
    DTYPES,
    INTERPRETED,
    LONG,
    ODD,
    ONE,
    Draw,
    Judge,
    Site,
    Tokens,
    activations,
    count,
    each,
    exact_back,
    exact_forward,
    fits_here,
    make_slots,
    reader_of,
    tail_is_untouched,
)

pytestmark = pytest.mark.usefixtures("poisoned")
EPS = 1e-5
SIZES: dict[int, Tokens] = {576: ONE, 896: ODD, 2048: [(0, 64)], 4096: LONG}
FEW = (896,)
RANKS = (16, 100, 5, 48)


def exact_norm(x_TD: Tensor, gain_D: Tensor) -> Tensor:
    x = x_TD.double()
    return gain_D.double() * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


def exact_norm_backward(dn_TD: Tensor, x_TD: Tensor, gain_D: Tensor) -> Tensor:
    x = x_TD.double().requires_grad_()
    y = gain_D.double() * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    (dx,) = torch.autograd.grad(y, x, dn_TD.double())
    return dx


@pytest.mark.parametrize("rides", [False, True])
@pytest.mark.parametrize("update", ["none", "alone", "with a low-rank term"])
@pytest.mark.parametrize(("width", "dtype"), each(SIZES, FEW))
def test_forward(width: int, update: str, rides: bool, dtype: torch.dtype, device: torch.device, judge: Judge) -> None:
    tokens = SIZES[width]
    fits_here(count(tokens), width)
    draw = Draw(width, dtype, device)
    x_TD, y_TD, gain_D = draw(count(tokens), width), draw(count(tokens), width), draw.gain(width)
    reader = reader_of(tokens, width, draw) if rides else None
    low = make_slots(Site(RANKS, 64, (width,)), tokens, draw).low
    low_TW = activations(low, tokens, draw)
    wanted = x_TD.double()
    given = None if update == "none" else Sum(y_TD.clone(), None)
    if given is not None:
        wanted = wanted + y_TD.double()
    if given is not None and update != "alone":
        given.addend = Addend(low_TW, low, back=False)
        wanted = wanted + exact_forward(low_TW, low)
    out_TD, n_TD = add_norm(x_TD, given, gain_D, EPS, fuse=True, reader=reader)
    judge("add_norm x", out_TD, wanted)
    assert update != "none" or out_TD is x_TD
    judge("add_norm n", n_TD, exact_norm(out_TD, gain_D), roundings=2)
    assert tail_is_untouched(n_TD, reader) and (given is None or given.addend is None)


@pytest.mark.parametrize("rides", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("term", ["none", "low", "dropped"])
@pytest.mark.parametrize(("width", "dtype"), each(SIZES, FEW))
def test_backward(
    width: int,
    term: str,
    residual: bool,
    rides: bool,
    dtype: torch.dtype,
    device: torch.device,
    judge: Judge,
) -> None:
    tokens = SIZES[width]
    fits_here(count(tokens), width)
    draw = Draw(width, dtype, device)
    dn_TD, x_TD, gain_D = draw(count(tokens), width), draw(count(tokens), width), draw.gain(width)
    # The residual is a gradient with a tail of its own where slots ride.
    wide_TX = draw(count(tokens), width + 64)
    passed_TD = wide_TX[:, :width] if residual else None
    reader = reader_of(tokens, width, draw) if rides else None
    low = make_slots(Site(RANKS, width, (64,)), tokens, draw, drop=0.2 if term == "dropped" else 0.0).low
    d_low_TW = activations(low, tokens, draw)
    dn, exact_dn = Sum(dn_TD.clone(), None), dn_TD.double()
    if term != "none":
        dn.addend = Addend(d_low_TW, low, back=True)
        exact_dn = exact_dn + exact_back(d_low_TW, low, width)
    dx_TD, n_TD = add_norm_backward(dn, x_TD, passed_TD, gain_D, EPS, fuse=True, reader=reader)
    exact = exact_norm_backward(exact_dn, x_TD, gain_D) + (0 if passed_TD is None else passed_TD.double())
    judge("add_norm_backward dx", dx_TD, exact, roundings=2)
    judge("add_norm_backward n", n_TD, exact_norm(x_TD, gain_D), roundings=2)
    assert tail_is_untouched(dx_TD, reader)


@pytest.mark.parametrize("term", [False, True])
@pytest.mark.parametrize(("width", "dtype"), each(SIZES, FEW))
def test_results_in_fp8_have_the_bits_of_those_quantised_apart(
    width: int, term: bool, dtype: torch.dtype, device: torch.device
) -> None:
    tokens = SIZES[width]
    fits_here(count(tokens), width)
    draw = Draw(width, dtype, device)
    x_TD, y_TD, gain_D = draw(count(tokens), width), draw(count(tokens), width), draw.gain(width)
    scale_D = draw(width).abs().float() * 1e-3
    low = make_slots(Site(RANKS, width, (width,)), tokens, draw).low
    low_TW = activations(low, tokens, draw)
    update, dn = (Sum(y_TD.clone(), Addend(low_TW, low, back=back) if term else None) for back in (False, True))
    ahead, back = (Quantised(rows_in_fp8(count(tokens), width, device), scale) for scale in (None, scale_D))
    _, n_TD = add_norm(x_TD, update, gain_D, EPS, fuse=True, quantised=ahead)
    dx_TD, _ = add_norm_backward(dn, x_TD, None, gain_D, EPS, fuse=True, quantised=back)
    for found, rows_TD in ((ahead, n_TD), (back, dx_TD)):
        wanted = quantise_rows_reference(rows_TD, found.column_scale_D)
        assert torch.equal(found.rows.scale_T, wanted.scale_T)
        values_TD = found.rows.values_TD.to(FP8_DTYPE)
        assert torch.equal(values_TD.view(torch.uint8), wanted.values_TD.view(torch.uint8))


def rows_in_fp8(tokens: int, width: int, device: torch.device) -> Fp8Rows:
    """The interpreter cuts fp8 off instead of rounding it: there the values stay fp32."""
    rows = empty_rows(tokens, width, device)
    return Fp8Rows(torch.empty((tokens, width), device=device), rows.scale_T) if INTERPRETED else rows


@pytest.mark.parametrize("term", ["none", "low"])
def test_a_norm_made_again_has_its_bits(term: str, device: torch.device) -> None:
    tokens, width = ODD, 896
    draw = Draw(width, DTYPES[0], device)
    x_TD, y_TD, gain_D = draw(count(tokens), width), draw(count(tokens), width), draw.gain(width)
    low = make_slots(Site(RANKS, 64, (width,)), tokens, draw).low
    addend = Addend(activations(low, tokens, draw), low, back=False) if term == "low" else None
    out_TD, n_TD = add_norm(x_TD, Sum(y_TD, addend), gain_D, EPS, fuse=True)
    again_TD = add_norm(out_TD, None, gain_D, EPS, fuse=True, added=None if addend is None else low)[1]
    assert torch.equal(n_TD, again_TD)
