"""From the projection to attention's heads and back: low-rank terms, norms, rotation, gradients of any strides."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tenon.kernels.low_rank import Addend, Sum
from tenon.kernels.rotary import Heads, HeadShape, Rotation, make_heads, make_heads_backward, rotary_reference
from tests.gpu.kit import (
    ODD,
    ONE,
    Draw,
    Judge,
    Site,
    Tokens,
    activations,
    count,
    each,
    exact_forward,
    fits_here,
    make_slots,
    reader_of,
    tail_is_untouched,
)

pytestmark = pytest.mark.usefixtures("poisoned")
EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """strides: of the gradients that come back. term: whether a low-rank term is added. rides: whether there is room
    for low-rank gradients behind. cut: whether classes of rank have launches of their own.
    """

    tokens: Tokens
    heads: int
    kv: int
    size: int
    norms: bool = False
    turns: bool = True
    term: bool = True
    strides: str = "contiguous"
    rides: bool = False
    cut: bool = False


CASES = {
    "one token": Case(ONE, 9, 3, 64, term=False, rides=True),
    "SmolLM2": Case(ODD, 9, 3, 64, strides="by head"),
    "Qwen 2.5": Case(ODD, 14, 2, 64, strides="every second"),
    "Llama": Case(ODD, 32, 8, 128, term=False, rides=True, strides="by head"),
    "SmolLM2, classes": Case(ODD, 9, 3, 64, cut=True),
    "Qwen 3, classes": Case(ODD, 32, 8, 128, norms=True, cut=True),
    "Qwen 3": Case(ODD, 32, 8, 128, norms=True),
    "Qwen 3, riding": Case(ODD, 32, 8, 128, norms=True, term=False, rides=True, strides="by head"),
    "without rotation": Case(ODD, 16, 4, 128, turns=False),
    "norms without rotation": Case(ODD, 4, 2, 80, norms=True, turns=False),
    "no power of two": Case([(0, 3), (1, 64)], 4, 2, 80, rides=True),
}
FEW = ("Qwen 3", "no power of two")


def shape_of(heads: int, kv: int, size: int, draw: Draw, *, norms: bool) -> HeadShape:
    gains = (draw.gain(size), draw.gain(size)) if norms else (None, None)
    return HeadShape(heads, kv, size, *gains, EPS)


def turn_of(tokens: int, size: int, draw: Draw) -> Rotation:
    """Angles of any size, scaled as YaRN does."""
    angles = draw(tokens, size // 2, scale=3.0, dtype=torch.float32).repeat(1, 2)
    return Rotation((1.1 * angles.cos()).to(draw(1).dtype), (1.1 * angles.sin()).to(draw(1).dtype))


def exact_heads(raw_TO: Tensor, turn: Rotation | None, shape: HeadShape) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in float64, differentiable."""
    heads = raw_TO.view(len(raw_TO), -1, shape.size).split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
    out = []
    for x, gain_E in zip(heads[:2], (shape.q_norm_E, shape.k_norm_E), strict=True):
        if gain_E is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + shape.eps) * gain_E.double()
        out.append(x if turn is None else rotary_reference(x, turn.cos_TE.double(), turn.sin_TE.double()))
    return out[0], out[1], heads[2]


@pytest.mark.parametrize(("name", "dtype"), each(CASES, FEW))
def test_forward(name: str, dtype: torch.dtype, device: torch.device, judge: Judge) -> None:
    case = CASES[name]
    heads, kv, size, length = case.heads, case.kv, case.size, count(case.tokens)
    fits_here(length, (heads + 2 * kv) * size)
    draw = Draw(heads, dtype, device)
    shape = shape_of(heads, kv, size, draw, norms=case.norms)
    turn = turn_of(length, size, draw) if case.turns else None
    raw_TO = draw(length, (heads + 2 * kv) * size)
    site = Site((16, 5, 100, 48), 32, (heads * size, kv * size, kv * size))
    low = make_slots(site, case.tokens, draw, cut=case.cut).low
    low_TW = activations(low, case.tokens, draw)
    exact = raw_TO.double() + (exact_forward(low_TW, low) if case.term else 0)
    given = Sum(raw_TO.clone(), Addend(low_TW, low, back=False) if case.term else None)
    made = make_heads(given, turn, shape, fuse=True)
    if case.norms:
        assert made.raw_TO is not None
        judge("make_heads raw", made.raw_TO, exact)
        exact = made.raw_TO.double()
    wanted = exact_heads(exact, turn, shape)
    for name, found, right in zip("qkv", (made.q_THE, made.k_TKE, made.v_TKE), wanted, strict=True):
        judge(f"make_heads {name}", found, right, roundings=3)


@pytest.mark.parametrize(("name", "dtype"), each(CASES, FEW))
def test_backward(name: str, dtype: torch.dtype, device: torch.device, judge: Judge) -> None:
    case = CASES[name]
    heads, kv, size, length = case.heads, case.kv, case.size, count(case.tokens)
    fits_here(length, (heads + 2 * kv) * size)
    draw = Draw(heads, dtype, device)
    shape = shape_of(heads, kv, size, draw, norms=case.norms)
    turn = turn_of(length, size, draw) if case.turns else None
    raw_TO = draw(length, (heads + 2 * kv) * size)

    def gradient(count_heads: int) -> Tensor:
        if case.strides == "contiguous":
            return draw(length, count_heads, size)
        if case.strides == "by head":
            return draw(count_heads, length, size).transpose(0, 1)
        return draw(length, count_heads, 2 * size)[..., ::2]

    grads = (gradient(heads), gradient(kv), gradient(kv))
    exact = raw_TO.double().requires_grad_()
    (wanted,) = torch.autograd.grad(exact_heads(exact, turn, shape), exact, [g.double() for g in grads])
    reader = reader_of(case.tokens, 32, draw) if case.rides else None
    kept = Heads(
        *exact_heads(raw_TO, None, shape_of(heads, kv, size, draw, norms=False)), raw_TO if case.norms else None
    )
    found = make_heads_backward(grads, kept, turn, shape, fuse=True, reader=reader)
    judge("make_heads_backward", found, wanted)
    assert tail_is_untouched(found, reader)
