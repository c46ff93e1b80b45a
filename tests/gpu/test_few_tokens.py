"""Passes of few tokens: every kernel that takes them one by one, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tenon.batch import NO_SLOT
from tenon.kernels.low_rank import Addend, FewTokens, LowRank, Sum, project
from tenon.kernels.rms_norm import add_norm
from tenon.kernels.rotary import make_heads
from tenon.kernels.swiglu import swiglu
from tests.gpu.kit import (
    Draw,
    Judge,
    Site,
    Tokens,
    activations,
    count,
    each,
    exact_forward,
    exact_project,
    fits_here,
    make_slots,
)
from tests.gpu.test_heads import exact_heads, shape_of, turn_of
from tests.gpu.test_norms import EPS, exact_norm
from tests.gpu.test_swiglu import exact_swiglu

pytestmark = pytest.mark.usefixtures("poisoned")
# Fours of one slot, of several, and of none.
TOKENS: Tokens = [(0, 5), (NO_SLOT, 7), (2, 1), (1, 1), (3, 6)]
RANKS = (16, 5, 1, 100)


def few_of(low: LowRank, inputs: int) -> LowRank:
    """The same additions for tokens that are taken one by one; that is all that kernels are told of them."""
    assert low.routes is not None
    slots = [slot for slot, length in TOKENS for _ in range(length)]
    device = low.routes.tiles_N3.device
    few = FewTokens.of(torch.tensor(slots, dtype=torch.int32, device=device), width=low.width, inputs=inputs)
    none = low.routes.tiles_N3[:0]
    return replace(low, parts=(), routes=replace(low.routes, tiles_N3=none, chunks_C3=none, segments_M3=none, few=few))


@pytest.mark.parametrize(("inputs", "dtype"), each((96, 1024, 1100, 4096, 14336), (1100,)))
def test_project(inputs: int, dtype: torch.dtype, device: torch.device, judge: Judge) -> None:
    """Also the second time: who counted the programs begins at zero again."""
    fits_here(count(TOKENS), inputs, 16)
    draw = Draw(inputs, dtype, device)
    low = make_slots(Site(RANKS, inputs, (64, 64)), TOKENS, draw).low
    few = few_of(low, inputs)
    first = project(draw(count(TOKENS), inputs), few)
    x_TD = draw(count(TOKENS), inputs)
    found = project(x_TD, few)
    assert found is not None and first is not None
    judge("project few", found, exact_project(x_TD, low))


@pytest.mark.parametrize(("width", "dtype"), each((576, 4096), (576,)))
def test_norm(width: int, dtype: torch.dtype, device: torch.device, judge: Judge) -> None:
    draw = Draw(width, dtype, device)
    x_TD, y_TD, gain_D = draw(count(TOKENS), width), draw(count(TOKENS), width), draw.gain(width)
    low = make_slots(Site(RANKS, 64, (width,)), TOKENS, draw).low
    low_TW = activations(low, TOKENS, draw)
    wanted = x_TD.double() + y_TD.double() + exact_forward(low_TW, low)
    given = Sum(y_TD.clone(), Addend(low_TW, few_of(low, 64), back=False))
    out_TD, n_TD = add_norm(x_TD, given, gain_D, EPS, fuse=True)
    judge("add_norm few x", out_TD, wanted)
    judge("add_norm few n", n_TD, exact_norm(out_TD, gain_D), roundings=2)
    assert given.addend is None


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), each(((32, 8, 128), (14, 2, 64), (4, 2, 80)), ((4, 2, 80),)))
def test_heads(
    shape: tuple[int, int, int], turns: bool, norms: bool, dtype: torch.dtype, device: torch.device, judge: Judge
) -> None:
    heads, kv, size = shape
    fits_here(count(TOKENS), heads * size)
    draw = Draw(heads, dtype, device)
    of = shape_of(heads, kv, size, draw, norms=norms)
    turn = turn_of(count(TOKENS), size, draw) if turns else None
    raw_TO = draw(count(TOKENS), (heads + 2 * kv) * size)
    low = make_slots(Site(RANKS, 32, (heads * size, kv * size, kv * size)), TOKENS, draw).low
    low_TW = activations(low, TOKENS, draw)
    made = make_heads(Sum(raw_TO.clone(), Addend(low_TW, few_of(low, 32), back=False)), turn, of, fuse=True)
    exact: Tensor = raw_TO.double() + exact_forward(low_TW, low)
    if norms:
        assert made.raw_TO is not None
        judge("make_heads few raw", made.raw_TO, exact)
        exact = made.raw_TO.double()
    wanted = exact_heads(exact, turn, of)
    for name, found, right in zip("qkv", (made.q_THE, made.k_TKE, made.v_TKE), wanted, strict=True):
        judge(f"make_heads few {name}", found, right, roundings=3)


@pytest.mark.parametrize(("width", "dtype"), each((100, 14336), (100,)))
def test_swiglu(width: int, dtype: torch.dtype, device: torch.device, judge: Judge) -> None:
    fits_here(count(TOKENS), 2 * width)
    draw = Draw(width, dtype, device)
    gate_up_TF2 = draw(count(TOKENS), 2 * width, scale=2.0)
    low = make_slots(Site(RANKS, 64, (width, width)), TOKENS, draw).low
    low_TW = activations(low, TOKENS, draw)
    exact = exact_swiglu(gate_up_TF2.double() + exact_forward(low_TW, low))
    h_TF = swiglu(Sum(gate_up_TF2.clone(), Addend(low_TW, few_of(low, 64), back=False)), fuse=True)
    judge("swiglu few", h_TF, exact)
