"""SwiGLU and its backward with the gradients of the matrices beside it: sums in and out of the kernel, wide ranks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tenon.kernels.low_rank import Addend, Sum
from tenon.kernels.swiglu import swiglu, swiglu_backward
from tests.gpu.kit import (
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
    judge_gradients_a,
    judge_gradients_b,
    make_slots,
    reader_of,
    tail_is_untouched,
)

pytestmark = pytest.mark.usefixtures("poisoned")
FORWARD: dict[int, Tokens] = {896: ONE, 100: ODD, 1536: LONG, 14336: ODD}
# What a program holds, what it holds beside narrow blocks, and ranks of which some are too wide to hold.
SMALL, HELD, LARGE, WIDE = (16, 5, 1, 16), (16, 24, 32, 5), (40, 64, 16, 3), (48, 100, 64, 3)


def exact_swiglu(gate_up_TF2: Tensor) -> Tensor:
    gate, up = gate_up_TF2.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("ranks", [(), SMALL, HELD, LARGE, WIDE], ids=str)
@pytest.mark.parametrize(("width", "dtype"), each(FORWARD, (100,)))
def test_forward(
    width: int, ranks: tuple[int, ...], cut: bool, dtype: torch.dtype, device: torch.device, judge: Judge
) -> None:
    """cut: classes of rank have launches of their own."""
    tokens = FORWARD[width]
    fits_here(count(tokens), 2 * width)
    draw = Draw(width, dtype, device)
    gate_up_TF2 = draw(count(tokens), 2 * width, scale=2.0)
    reader = None if ranks else reader_of(tokens, width, draw)
    given, exact = Sum(gate_up_TF2.clone(), None), gate_up_TF2.double()
    if ranks:
        low = make_slots(Site(ranks, 64, (width, width)), tokens, draw, cut=cut).low
        low_TW = activations(low, tokens, draw)
        given.addend, exact = Addend(low_TW, low, back=False), exact + exact_forward(low_TW, low)
    h_TF = swiglu(given, fuse=True, reader=reader)
    # Ranks too wide to hold are added in a pass of its own: gate and up are rounded, then h.
    settled = given.addend is not None and given.addend.up_to is not None
    assert not settled or ranks == WIDE
    judge("swiglu", h_TF, exact_swiglu(exact), roundings=3 if settled else 1)
    assert tail_is_untouched(h_TF, reader)


@dataclass(frozen=True)
class Case:
    """ranks: of gate and up, and of down; () where no slot adapts them. added: their terms are in the sums already.

    cut: classes of rank have launches of their own.
    """

    tokens: Tokens
    width: int
    ranks: tuple[int, ...]
    down: tuple[int, ...]
    drop: float = 0.0
    added: bool = False
    cut: bool = False

    @property
    def wide(self) -> bool:
        """Whether some ranks are too wide to hold: their terms are added before, and h is kept for the gradients."""
        return WIDE in (self.ranks, self.down, self.down[::-1])


BACKWARD = {
    "one token": Case(ONE, 1536, (16,), (16,)),
    "no slot": Case([(-1, 65)], 1536, (), ()),
    "all": Case(ODD, 1536, SMALL, SMALL),
    "width of no block": Case(ODD, 100, HELD, SMALL),
    "dropped out": Case(ODD, 1536, SMALL, SMALL, drop=0.2),
    "gate and up alone": Case(ODD, 896, SMALL, ()),
    "down alone, dropped out": Case(ODD, 896, (), HELD, drop=0.1),
    "terms added before": Case(ODD, 1536, HELD, HELD, added=True),
    "chunks": Case(LONG, 1536, SMALL, HELD),
    "many tokens": Case([(0, 1500), (2, 900)], 1536, SMALL, SMALL),
    "wide": Case(ODD, 1536, WIDE, WIDE),
    "wide, chunks, dropped out": Case(LONG, 640, SMALL, WIDE, drop=0.3),
    "large": Case(ODD, 1536, LARGE, HELD),
    "large, chunks, dropped out": Case(LONG, 240, HELD, LARGE, drop=0.3),
    "classes": Case(ODD, 1536, LARGE, LARGE[::-1], cut=True),
    "classes, chunks, dropped out": Case(LONG, 240, LARGE, HELD, drop=0.3, cut=True),
    "classes, down alone": Case(LONG, 240, (), LARGE, cut=True),
    "classes, some wide": Case(ODD, 1536, WIDE, WIDE[::-1], cut=True),
    "classes, some wide, chunks, dropped out": Case(LONG, 240, WIDE, WIDE[::-1], drop=0.3, cut=True),
    "of 14336": Case(LONG, 14336, SMALL, SMALL),
}


@pytest.mark.parametrize(("name", "dtype"), each(BACKWARD, ("chunks", "dropped out", "wide, chunks, dropped out")))
def test_backward(name: str, dtype: torch.dtype, device: torch.device, judge: Judge) -> None:
    case, draw = BACKWARD[name], Draw(len(name), dtype, device)
    length, width = count(case.tokens), case.width
    fits_here(length, 2 * width)
    gate_up_TF2, dh_TF = draw(length, 2 * width, scale=2.0), draw(length, width)
    ahead_slots = make_slots(
        Site(case.ranks or (1,) * 4, 64, (width, width)), case.tokens, draw, drop=case.drop, cut=case.cut
    )
    down_slots = make_slots(Site(case.down or (1,) * 4, width, (64,)), case.tokens, draw, drop=case.drop, cut=case.cut)
    low_TW, d_low_TW = (activations(s.low, case.tokens, draw) for s in (ahead_slots, down_slots))
    ahead = Addend(low_TW, ahead_slots.low, back=False) if case.ranks else None
    back = Addend(d_low_TW, down_slots.low, back=True) if case.down else None
    gate_up, dh = Sum(gate_up_TF2.clone(), None), Sum(dh_TF.clone(), None)
    exact, exact_dh = gate_up_TF2.double(), dh_TF.double()
    if ahead is not None and not case.added:
        gate_up.addend, exact = ahead, exact + exact_forward(low_TW, ahead_slots.low)
    if back is not None and not case.added:
        dh.addend, exact_dh = back, exact_dh + exact_back(d_low_TW, down_slots.low, width)
    exact = exact.requires_grad_()
    h = exact_swiglu(exact)
    (wanted,) = torch.autograd.grad(h, exact, exact_dh)
    found = swiglu_backward(dh, gate_up, back, ahead, fuse=True)
    # Terms that are added before: dh, gate and up are rounded, then the result; h of what gate and up were rounded to.
    judge("swiglu_backward", found, wanted, roundings=4 if case.wide and not case.added else 1)
    kernel = "swiglu_backward, wide" if case.wide else "swiglu_backward"
    if back is not None:
        roundings = 4 if case.wide else 2
        judge_gradients_a(judge, kernel, h.detach(), d_low_TW, down_slots, dtype=dtype, roundings=roundings)
    if ahead is not None:
        judge_gradients_b(judge, kernel, found, low_TW, ahead_slots)
