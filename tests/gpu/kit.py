"""What the tests of kernels share: inputs, slots at one stacked weight, and the low-rank formulas in float64.

Shape legend: T tokens, D inputs, O outputs, R rank, W the widest low-rank activation.
"""

from __future__ import annotations

import math
import os
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

from tenon.batch import NO_SLOT, Segment
from tenon.data.pack import list_routes, slot_routes, upload
from tenon.kernels.blocks_triton import TILE
from tenon.kernels.dropout import keep_mask
from tenon.kernels.low_rank import RANK_STEP, LoraGroup, LoraMember, LoraPart, LowRank, Routes, whole
from tenon.kernels.low_rank_table import site_table

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter cuts bf16 off instead of rounding it.
DTYPES = (torch.float32,) if INTERPRETED else (torch.bfloat16, torch.float16, torch.float32)
# Relative errors (Frobenius norms) that one rounding to a dtype makes, and half as much again; fp32's is that of sums.
ONE_ROUNDING = {torch.bfloat16: 2.5e-3, torch.float16: 3.2e-4, torch.float32: 2e-6}

# Tokens of neighbouring slots; NO_SLOT: of the bare base.
Tokens = Sequence[tuple[int, int]]
ONE: Tokens = [(0, 1)]
ODD: Tokens = [(0, 63), (NO_SLOT, 64), (2, 65), (1, 1), (3, 9)]
# More than one chunk of each sum.
LONG: Tokens = [(1, 700), (NO_SLOT, 3), (3, 513), (0, 65)]


class Judge(Protocol):
    """Holds a result against float64: see `conftest.judge`."""

    def __call__(
        self, kernel: str, found: Tensor, exact: Tensor, *, roundings: float = 1.0, dtype: torch.dtype | None = None
    ) -> None: ...


def bound_of(dtype: torch.dtype, roundings: float = 1.0) -> float:
    """The largest relative error of a result that went through so many roundings."""
    return ONE_ROUNDING[dtype] * math.sqrt(roundings)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact| where exact is a number; 0 of nothing, NaN when something found is none."""
    asked = ~exact.isnan()
    wanted = exact[asked]
    apart = float((found.double()[asked] - wanted).norm())
    return apart / max(float(wanted.norm()), 1e-300) if wanted.numel() else 0.0


def count(tokens: Tokens) -> int:
    return sum(length for _, length in tokens)


def each(cases: Iterable[Any], few: Container[Any] = ()) -> list[Any]:
    """(case, dtype) for parametrize: all cases in bf16, some of them in the other dtypes too.

    A kernel takes about a second to compile, for every dtype anew.
    """
    return [
        pytest.param(case, dtype, id=f"{case}-{str(dtype).removeprefix('torch.')}")
        for case in cases
        for dtype in DTYPES
        if dtype == DTYPES[0] or case in few
    ]


def fits_here(*sizes: int) -> None:
    """Skip what the interpreter would take too long for."""
    if INTERPRETED and math.prod(sizes) > 1_000_000:
        pytest.skip("too large for the interpreter")


@contextmanager
def supported(dtype: torch.dtype) -> Iterator[None]:
    """Runs never use fused kernels in fp32; a block may be too large for it there, which is no fault."""
    try:
        yield
    except Exception as error:  # Triton's own class is nowhere exported
        if dtype == torch.float32 and "out of resource" in str(error):
            pytest.skip("the block is too large in fp32")
        raise


class Draw:
    """Fresh random tensors, the same in every run and on every device."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self._generator, self._dtype, self._device = torch.Generator().manual_seed(seed), dtype, device

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values."""
        values = torch.randn(shape, generator=self._generator) * scale
        return values.to(self._device, dtype or self._dtype)

    def gain(self, size: int) -> Tensor:
        """A norm's gain."""
        return (1 + 0.2 * torch.randn(size, generator=self._generator)).to(self._device, self._dtype)


@dataclass(frozen=True)
class Site:
    """Slots at one stacked weight: their ranks at each module, its inputs, its modules' outputs.

    Ranks are made up to whole steps, with values that are not zero: whatever lies there must count.
    """

    ranks: Sequence[int]
    inputs: int
    outs: tuple[int, ...]

    @property
    def stored(self) -> list[int]:
        return [-(-rank // RANK_STEP) * RANK_STEP for rank in self.ranks]

    @property
    def outputs(self) -> int:
        return sum(self.outs)


@dataclass(frozen=True)
class Slots:
    """Slots as kernels take them, and the matrices of all of them, those without a token too."""

    low: LowRank
    groups: list[LoraGroup]


def make_slots(
    site: Site,
    tokens: Tokens,
    draw: Draw,
    *,
    drop: float = 0.0,
    rides: bool = False,
    pad: bool = False,
    cut: bool = False,
) -> Slots:
    """All slots of a site. Slot 1 leaves the second module out; every matrix lies where the last one ended, so that
    hardly one begins at a whole line of memory; gradients begin at one half everywhere.

    pad: with tiles and chunks of nothing behind, as padded batches have them. cut: classes of rank have launches of
    their own, as in batches of many tokens.
    """
    groups = [_group(site, slot, rank, draw, drop) for slot, rank in enumerate(site.stored)]
    device = groups[0].a_RD.device
    segments, at = [], 0
    for slot, length in tokens:
        segments.append(Segment(slot, at, at + length))
        at += length
    draw_T = torch.randint(-(2**31), 2**31, (at,), generator=torch.Generator().manual_seed(at)).to(device, torch.int32)
    listed = list_routes(tuple(segments), TILE, pad=pad)
    found = slot_routes(upload(listed, device), listed)
    lists = found.tiles_N3, found.chunks_C3, found.segments_M3
    routes = Routes(*lists, found.whole, draw_T if drop else None, found.listed if cut else None)
    parts = tuple(
        LoraPart(groups[s.slot], s.start, s.stop, draw_T[s.start : s.stop] if drop else None)
        for s in segments
        if s.slot >= 0
    )
    bounds = tuple(sum(site.outs[:i]) for i in range(len(site.outs) + 1))
    width = -(-max(group.a_RD.shape[0] for group in groups) // 16) * 16
    low = LowRank(parts, bounds, width, max(site.stored), routes, site_table(groups, device), rides)
    return Slots(low, groups)


def _group(site: Site, slot: int, rank: int, draw: Draw, drop: float) -> LoraGroup:
    modules = [i for i in range(len(site.outs)) if not (slot == 1 and i == 1)]
    total = RANK_STEP + len(modules) * rank * site.inputs + sum(rank * site.outs[i] for i in modules)
    values, gradients = draw(total, scale=0.1), torch.full((total,), 0.5, device=draw(1).device)
    a = slice(RANK_STEP, RANK_STEP + len(modules) * rank * site.inputs)
    members, at = [], a.stop
    for place, i in enumerate(modules):
        out = sum(site.outs[:i])
        stop = at + rank * site.outs[i]
        b, grad_b = (x[at:stop].view(site.outs[i], rank) for x in (values, gradients))
        scale = 0.5 + slot
        members.append(LoraMember(b, grad_b, out, out + site.outs[i], place * rank, (place + 1) * rank, scale, i))
        at = stop
    a_RD, grad_a_RD = (x[a].view(len(modules) * rank, site.inputs) for x in (values, gradients))
    return LoraGroup(a_RD, grad_a_RD, tuple(members), drop, 11 + slot)


def reader_of(tokens: Tokens, inputs: int, draw: Draw) -> LowRank:
    """The additions of one slot that rides, for what leaves room behind its rows: only their width matters there."""
    return make_slots(Site((20,), inputs, (16, 16)), [(0, count(tokens))], draw, rides=True).low


def tail_is_untouched(x_TC: Tensor, reader: LowRank | None) -> bool:
    """Whether the room behind the rows holds what the poisoned memory held; True where there is none."""
    return reader is None or bool(whole(x_TC, reader)[:, x_TC.shape[1] :].isnan().all())


def activations(low: LowRank, tokens: Tokens, draw: Draw) -> Tensor:
    """(T, W) low-rank activations; NaN wherever no kernel may look."""
    low_TW = draw(count(tokens), low.width)
    seen = torch.zeros(low_TW.shape, dtype=torch.bool, device=low_TW.device)
    for part in low.parts:
        seen[part.start : part.stop, : part.group.a_RD.shape[0]] = True
    return low_TW.masked_fill_(~seen, float("nan"))


# ---- the formulas ---------------------------------------------------------------------------------------------------


def dropped(x_TD: Tensor, part: LoraPart) -> Tensor:
    """x of a part in float64, dropped out and scaled, or as it is."""
    x = x_TD[part.start : part.stop].double()
    return x if part.draw_T is None else x * _keep(part, x.shape[1])


def _keep(part: LoraPart, features: int) -> Tensor:
    assert part.draw_T is not None
    return keep_mask(part.draw_T, part.group.salt, features, part.group.dropout).double() / (1 - part.group.dropout)


def exact_project(x_TD: Tensor, low: LowRank) -> Tensor:
    """(T, W): A drop(x); NaN where it is not defined."""
    out = torch.full((len(x_TD), low.width), float("nan"), dtype=torch.float64, device=x_TD.device)
    for part in low.parts:
        out[part.start : part.stop, : part.group.a_RD.shape[0]] = dropped(x_TD, part) @ part.group.a_RD.double().t()
    return out


def exact_project_back(dy_TO: Tensor, low: LowRank) -> Tensor:
    """(T, W): s B^T dy; NaN where it is not defined."""
    out = torch.full((len(dy_TO), low.width), float("nan"), dtype=torch.float64, device=dy_TO.device)
    for part in low.parts:
        dy = dy_TO[part.start : part.stop].double()
        for m in part.group.members:
            mine = dy[:, m.out_start : m.out_stop] @ m.b_OR.double()
            out[part.start : part.stop, m.rank_start : m.rank_stop] = m.scale * mine
    return out


def exact_forward(low_TW: Tensor, low: LowRank) -> Tensor:
    """(T, O): s B low; zero for tokens of no slot."""
    out = torch.zeros(len(low_TW), low.bounds[-1], dtype=torch.float64, device=low_TW.device)
    for part in low.parts:
        for m in part.group.members:
            mine = low_TW[part.start : part.stop, m.rank_start : m.rank_stop].double()
            out[part.start : part.stop, m.out_start : m.out_stop] = m.scale * mine @ m.b_OR.double().t()
    return out


def exact_back(d_low_TW: Tensor, low: LowRank, inputs: int) -> Tensor:
    """(T, D): drop'(A^T d_low); zero for tokens of no slot."""
    out = torch.zeros(len(d_low_TW), inputs, dtype=torch.float64, device=d_low_TW.device)
    for part in low.parts:
        mine = d_low_TW[part.start : part.stop, : part.group.a_RD.shape[0]].double() @ part.group.a_RD.double()
        out[part.start : part.stop] = mine if part.draw_T is None else mine * _keep(part, inputs)
    return out


def judge_gradients_a(
    judge: Judge,
    kernel: str,
    x_TD: Tensor,
    d_low_TW: Tensor,
    slots: Slots,
    *,
    dtype: torch.dtype | None = None,
    roundings: float = 1.0,
) -> None:
    """Hold every slot's gradient of A, which began at one half; that of a slot without tokens stays it.

    dtype, roundings: of x in the kernel, where what is given here is exact.
    """
    for group in slots.groups:
        exact = torch.zeros(group.a_RD.shape, dtype=torch.float64, device=x_TD.device)
        for part in _parts(slots, group):
            exact += d_low_TW[part.start : part.stop, : len(exact)].double().t() @ dropped(x_TD, part)
        _judge_gradient(judge, f"{kernel} dA", group.grad_a_RD, exact, dtype or x_TD.dtype, roundings)


def judge_gradients_b(judge: Judge, kernel: str, dy_TO: Tensor, low_TW: Tensor, slots: Slots) -> None:
    """The same of every B."""
    for group in slots.groups:
        for m in group.members:
            exact = torch.zeros(m.b_OR.shape, dtype=torch.float64, device=dy_TO.device)
            for part in _parts(slots, group):
                dy = dy_TO[part.start : part.stop, m.out_start : m.out_stop].double()
                exact += m.scale * dy.t() @ low_TW[part.start : part.stop, m.rank_start : m.rank_stop].double()
            _judge_gradient(judge, f"{kernel} dB", m.grad_b_OR, exact, dy_TO.dtype)


def _parts(slots: Slots, group: LoraGroup) -> list[LoraPart]:
    return [part for part in slots.low.parts if part.group is group]


def _judge_gradient(
    judge: Judge, kernel: str, found: Tensor | None, exact: Tensor, dtype: torch.dtype, roundings: float = 1.0
) -> None:
    assert found is not None
    if bool(exact.any()):
        judge(kernel, found.double() - 0.5, exact, dtype=dtype, roundings=roundings)
    else:
        assert bool((found == 0.5).all()), f"{kernel}: a slot without tokens has a gradient"
