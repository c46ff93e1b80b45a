"""The low-rank products, the sums and the gradients of A and B: several slots, ranks, modules, chunks, dropout."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tenon.kernels.low_rank import Addend, Sum, add_gradient_a, add_gradient_b, project, project_back
from tests.gpu.kit import (
    DTYPES,
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
    exact_project,
    exact_project_back,
    fits_here,
    judge_gradients_a,
    judge_gradients_b,
    make_slots,
    supported,
)

pytestmark = pytest.mark.usefixtures("poisoned")
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    site: Site
    tokens: Tokens
    drop: float = 0.0
    pad: bool = False
    cut: bool = False


SMALL, LARGE, MIXED = (16, 5, 1, 16), (48, 64, 100, 7), (40, 5, 100, 24)
CASES = {
    "one token": Case(Site((16,), 96, (40,)), ONE),
    "qkv of 576": Case(Site(SMALL, 576, (576, 192, 192)), ODD),
    "the same, dropped out": Case(Site(SMALL, 576, (576, 192, 192)), ODD, drop=0.1),
    "chunks, large ranks": Case(Site(LARGE, 896, (896, 128, 128)), LONG),
    "chunks, dropped out, padded": Case(Site((3, 20, 16, 8), 200, (72, 136)), LONG, drop=0.3, pad=True),
    "classes": Case(Site(MIXED, 576, (576, 192, 192)), ODD, cut=True),
    "classes, chunks": Case(Site(MIXED, 320, (200, 64, 64)), LONG, cut=True),
    "classes, chunks, dropped out, padded": Case(Site(MIXED, 200, (72, 136)), LONG, drop=0.3, pad=True, cut=True),
    "qkv of 4096": Case(Site(LARGE, 4096, (4096, 1024, 1024)), ODD),
    "gate and up": Case(Site(SMALL, 2048, (8192, 8192)), LONG),
    "down": Case(Site(SMALL, 14336, (4096,)), LONG),
}
FEW = ("the same, dropped out", "chunks, large ranks", "classes, chunks")


@pytest.mark.parametrize(("name", "dtype"), each(CASES, FEW))
def test_every_product_sum_and_gradient(name: str, dtype: torch.dtype, device: torch.device, judge: Judge) -> None:
    case, draw = CASES[name], Draw(len(name), dtype, device)
    tokens, site = count(case.tokens), case.site
    fits_here(tokens, site.inputs + site.outputs)
    slots = make_slots(site, case.tokens, draw, drop=case.drop, pad=case.pad, cut=case.cut)
    low = slots.low
    x_TD, dy_TO = draw(tokens, site.inputs), draw(tokens, site.outputs)
    low_TW, d_low_TW = activations(low, case.tokens, draw), activations(low, case.tokens, draw)
    dropped = 1 if case.drop else 0
    with supported(dtype):
        found = project(x_TD, low)
        assert found is not None
        judge("project", found, exact_project(x_TD, low), roundings=1 + dropped)
        judge("project_back", project_back(dy_TO, low), exact_project_back(dy_TO, low))
        y_TO = Sum(dy_TO.clone(), Addend(low_TW, low, back=False)).settled()
        judge("add forward", y_TO, dy_TO.double() + exact_forward(low_TW, low))
        dx_TD = Sum(x_TD.clone(), Addend(d_low_TW, low, back=True)).settled()
        judge("add back", dx_TD, x_TD.double() + exact_back(d_low_TW, low, site.inputs))
        add_gradient_a(x_TD, d_low_TW, low)
        judge_gradients_a(judge, "add_gradient", x_TD, d_low_TW, slots)
        add_gradient_b(dy_TO, low_TW, low)
        judge_gradients_b(judge, "add_gradient", dy_TO, low_TW, slots)


@pytest.mark.parametrize("length", [4_200, 17_000])
def test_blocks_of_more_tokens(length: int, device: torch.device, judge: Judge) -> None:
    """Programs take more tokens each when there are many; several slots, so that torch's products are not taken."""
    fits_here(length, 1024)
    tokens: Tokens = [(0, length), (1, 40)]
    draw = Draw(1, BF16, device)
    low = make_slots(Site((16, 5), 1024, (512, 256)), tokens, draw).low
    x_TD, dy_TO = draw(count(tokens), 1024), draw(count(tokens), 768)
    found = project(x_TD, low)
    assert found is not None and not low.plain
    judge("project", found, exact_project(x_TD, low))
    judge("project_back", project_back(dy_TO, low), exact_project_back(dy_TO, low))


def test_gradients_add_up_and_are_the_same_bits_twice(device: torch.device) -> None:
    fits_here(count(LONG), 640)
    sums = []
    for _ in range(2):
        draw = Draw(5, DTYPES[0], device)
        slots = make_slots(Site((16, 8, 4, 2), 640, (640,)), LONG, draw)
        x_TD, d_low_TW = draw(count(LONG), 640), activations(slots.low, LONG, draw)
        once = []
        for _ in range(2):
            add_gradient_a(x_TD, d_low_TW, slots.low)
            once.append([g.grad_a_RD.clone() - 0.5 for g in slots.groups if g.grad_a_RD is not None])
        for first, both in zip(*once, strict=True):
            torch.testing.assert_close(both, 2 * first, rtol=1e-4, atol=1e-4)
        sums.append(once[1])
    assert all(torch.equal(a, b) for a, b in zip(*sums, strict=True))
