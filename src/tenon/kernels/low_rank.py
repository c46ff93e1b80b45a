"""The low-rank additions of LoRA beside a frozen linear map, for several slots in one token stream.

    y[t] = W x[t] + s_slot B_slot A_slot drop(x[t])      for the tokens t of each slot

The frozen product is not this module's. Here are the four small products around it, with low = A drop(x) and
d_low = s B^T dy:

    project      low  = A drop(x)                    d_a:   dA += d_low^T drop(x)
    project_back d_low = s B^T dy                    d_b:   dB += s dy^T low
    and the two sums  y += s B low  and  dx += drop'(A^T d_low), which are an `Addend`: where kernels are fused, whoever
    reads y or dx next adds the term while reading, so that it costs no pass over memory of its own.

One weight W may hold several modules stacked along its outputs (q, k, v; gate, up). Their A matrices are stacked too,
so that one product makes all low-rank activations; each B writes the outputs of its own module.

The gradients of A and B are *added into* the fp32 buffers that the groups carry: a slot has one flat gradient, and a
micro-batch adds to it. The gradient of W does not exist.

Source: Hu et al., 2021 (LoRA). Shape legend: T tokens, D inputs, O outputs, R ranks of a group, W the widest R of the
bank. This module does not know what a slot is trained for, nor how its matrices are stored.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from tenon.kernels import low_rank_few_triton
from tenon.kernels import low_rank_gradient_triton as gradient
from tenon.kernels import low_rank_triton as fused
from tenon.kernels.dropout import dropout, keep_mask
from tenon.kernels.low_rank_classes import RankClass, classes
from tenon.kernels.low_rank_few_triton import FewTokens
from tenon.kernels.threads import threads_for


@dataclass(frozen=True, slots=True)
class LoraMember:
    """One module of the stacked weight: b_OR writes outputs [out_start, out_stop) from ranks [rank_start,
    rank_stop). index: which module of the stack it is. Fused kernels want ranks of whole RANK_STEP. b_RO: B transposed,
    a view: a pass on a CPU has thousands of these products, and making views would take as long as they do.
    """

    b_OR: Tensor
    grad_b_OR: Tensor | None
    out_start: int
    out_stop: int
    rank_start: int
    rank_stop: int
    scale: float
    index: int = 0
    b_RO: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "b_RO", self.b_OR.t())


@dataclass(frozen=True, slots=True)
class LoraGroup:
    """One slot's matrices at one stacked weight. Gradients are None when the slot is only used, not trained.

    Fused kernels want every matrix and gradient to begin at 16 bytes. a_DR: A transposed, a view. ranks:
    of the members.
    """

    a_RD: Tensor
    grad_a_RD: Tensor | None
    members: tuple[LoraMember, ...]
    dropout: float = 0.0
    salt: int = 0
    a_DR: Tensor = field(init=False, repr=False)
    ranks: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "a_DR", self.a_RD.t())
        object.__setattr__(self, "ranks", tuple(m.rank_stop - m.rank_start for m in self.members))


@dataclass(frozen=True, slots=True)
class LoraPart:
    """A group applied to the tokens [start, stop); draw_T holds their dropout keys (None: no dropout)."""

    group: LoraGroup
    start: int
    stop: int
    draw_T: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Routes:
    """Which slot each token belongs to, as the kernels read it; made once for a batch.

    tiles_N3: int64 (slot or -1, start, stop) of runs of at most TILE tokens. chunks_C3: the same of longer runs, over
    which gradients are summed. segments_M3: (slot, first chunk, chunk after its last) of each slot. whole: every slot
    has one chunk. draw_T: dropout keys of all tokens, or None. listed: tiles and chunks on the host, None where slots
    of different rank are not worth launches of their own. cuts: the classes that were made of them. few: the same of a
    pass of few tokens, which kernels take one by one; None else.
    """

    tiles_N3: Tensor
    chunks_C3: Tensor
    segments_M3: Tensor
    whole: bool
    draw_T: Tensor | None
    listed: tuple[np.ndarray, np.ndarray] | None = None
    cuts: dict[Hashable, tuple[RankClass, ...]] = field(default_factory=dict)
    few: FewTokens | None = None


@dataclass(frozen=True, slots=True)
class LowRank:
    """All slots' additions at one stacked weight, for one batch.

    bounds: where each module's outputs begin, and the end. width: W. rank: the widest rank of one module. table_SF:
    int64 facts of every slot (`low_rank_table`); routes and table_SF are None where kernels are not fused. parts may be
    missing where they are not None, and the pass is not recorded: the kernels need no more than the table. rides: the
    one slot's matrices lie in the border of the frozen weight, and its low-rank activations in the tails of the rows,
    so that both sums are made by the frozen product itself (see `room`). shelved: so many rows of A lie below the
    frozen weight (see `models.frozen.DenseLinear`), and the table says where each slot's are; 0: none.
    widths: of the modules. row_cuts: lengths of parts and of what lies between them, up to the last part's end;
    row_places: which of these are parts.
    """

    parts: tuple[LoraPart, ...]
    bounds: tuple[int, ...]
    width: int
    rank: int
    routes: Routes | None = None
    table_SF: Tensor | None = None
    rides: bool = False
    shelved: int = 0
    widths: tuple[int, ...] = field(init=False, repr=False)
    row_cuts: tuple[int, ...] = field(init=False, repr=False)
    row_places: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        cuts, places, end = [], [], 0
        for part in self.parts:
            if part.start > end:
                cuts.append(part.start - end)
            places.append(len(cuts))
            cuts.append(part.stop - part.start)
            end = part.stop
        object.__setattr__(self, "widths", tuple(b - a for a, b in itertools.pairwise(self.bounds)))
        object.__setattr__(self, "row_cuts", tuple(cuts))
        object.__setattr__(self, "row_places", tuple(places))

    def rows(self, x_TX: Tensor) -> list[Tensor]:
        """Each part's rows: views, made in one call."""
        pieces = x_TX.split_with_sizes((*self.row_cuts, x_TX.shape[0] - sum(self.row_cuts)))
        return [pieces[place] for place in self.row_places]

    @property
    def fused(self) -> bool:
        """Whether kernels may be: tokens and slots are listed as these read them."""
        return self.routes is not None and self.table_SF is not None

    @property
    def plain(self) -> bool:
        """Whether the products are torch's own: kernels are not fused, or parts are so long that its own are faster."""
        if not self.fused:
            return True
        long = all(part.stop - part.start >= _LONG_TOKENS and part.draw_T is None for part in self.parts)
        return long and bool(self.parts)

    @property
    def tiles_alone(self) -> bool:
        """Whether all that is told of a pass are its tiles: a prompt that is replayed."""
        return self.routes is not None and self.few is None and not self.parts

    @property
    def few(self) -> FewTokens | None:
        """The routes of a pass whose tokens kernels take one by one."""
        return None if self.routes is None else self.routes.few


# Tokens from which torch's product of one part is faster than the share of a kernel that takes all parts at once.
_LONG_TOKENS = 2048
# From here on classes of rank have launches of their own (see `low_rank_classes`): with fewer tokens a launch takes
# longer than it saves, and batches that are replayed as graphs must not depend on the lengths of their parts.
CUT_TOKENS = 2048
# Elements of a line of memory, in half precision.
LINE = 64
# Ranks are stored in multiples of this: rows of 16 bytes in half precision, what fast products and loads take.
RANK_STEP = 8


@dataclass(frozen=True, slots=True)
class Addend:
    """A low-rank term that is still to be added: s B low to an output, or (back) A^T d_low to a gradient of inputs.

    up_to: slots of a larger rank have theirs added already; None: no slot has.
    """

    low_TW: Tensor
    low: LowRank
    back: bool
    up_to: int | None = None


@dataclass(slots=True)
class Sum:
    """A product of the frozen weight and the low-rank term that its reader is to add. None: it is complete."""

    y_TO: Tensor
    addend: Addend | None

    def settled(self) -> Tensor:
        """The complete sum; the term is added in place, once."""
        if self.addend is not None:
            _add(self.y_TO, self.addend)
            self.addend = None
        return self.y_TO


def settle_if_long(total: Sum) -> None:
    """Add the term now where torch's own product does it faster than a kernel that adds it while it reads."""
    if total.addend is not None and total.addend.low.plain:
        total.settled()


# ---- tails ----------------------------------------------------------------------------------------------------------


def room(like_TX: Tensor, columns: int, low: LowRank | None) -> Tensor:
    """(T, columns), not initialised; with a tail of low.width columns behind each row where low rides.

    [x, low] [W, s B]^T = W x + s B low: with x's low-rank activations in its tail and s B in the weight's border, one
    product makes the sum; likewise [dy, d_low] [W; A] = dy W + d_low A on the way back.
    """
    tail = low.width if low is not None and low.rides else 0
    # Rows begin at whole lines of 128 bytes: products read others up to 12% slower.
    stride = -(-(columns + tail) // LINE) * LINE if tail else columns
    return like_TX.new_empty(like_TX.shape[0], stride)[:, :columns]


def whole(x_TC: Tensor, low: LowRank) -> Tensor:
    """(T, C + W): the rows with their tails."""
    return x_TC.as_strided((x_TC.shape[0], x_TC.shape[1] + low.width), (x_TC.stride(0), 1))


def _low_room(x_TC: Tensor, low: LowRank) -> Tensor:
    """(T, W) for low-rank activations: the tail of x where low rides, zero where the slot has no rank."""
    if not low.rides:
        return x_TC.new_empty(x_TC.shape[0], low.width)
    tail_TW = whole(x_TC, low)[:, x_TC.shape[1] :]
    rank = low.parts[0].group.a_RD.shape[0]
    if rank < low.width:
        tail_TW[:, rank:].zero_()
    return tail_TW


# ---- the products ---------------------------------------------------------------------------------------------------


def lora_linear_reference(
    x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None, parts: tuple[LoraPart, ...]
) -> Tensor:
    """The whole formula in plain torch, out of place, differentiable in x, A and B: what the rest is held against."""
    y = torch.nn.functional.linear(x_TD, weight_OD, bias_O)
    for part in parts:
        low = _dropped(x_TD[part.start : part.stop], part) @ part.group.a_RD.t()
        delta = torch.zeros_like(y)
        for m in part.group.members:
            update = m.scale * (low[:, m.rank_start : m.rank_stop] @ m.b_OR.t())
            delta[part.start : part.stop, m.out_start : m.out_stop] = update
        y = y + delta
    return y


def project(x_TD: Tensor, low: LowRank | None) -> Tensor | None:
    """low (T, W): each slot's A times the inputs of its tokens. Columns beyond a slot's rank are not defined.

    Where low rides, it is written into x's tail too.
    """
    if low is None:
        return None
    low_TW = _low_room(x_TD, low)
    if low.few is not None:
        low_rank_few_triton.project(x_TD, low_TW, low.width, low.few, low.table_SF)
        return low_TW
    if not low.plain:
        for one in classes(low, stacked=True):
            fused.project(x_TD, low_TW, one.width, one.routes, one.table_SF)
        return low_TW
    for part, x, rows_TW in zip(low.parts, low.rows(x_TD), low.rows(low_TW), strict=True):
        a_DR = part.group.a_DR
        with threads_for(x.shape[0] * a_DR.numel()):
            torch.mm(_dropped(x, part), a_DR, out=rows_TW.narrow(1, 0, a_DR.shape[1]))
    # A tape that holds the tail would hold all of x.
    return low_TW.contiguous() if low.rides else low_TW


def project_apart(x_TD: Tensor, low: LowRank | None) -> Tensor | None:
    """`project` of inputs that have no tail, whether low rides or not."""
    return project(x_TD, low if low is None or not low.rides else replace(low, rides=False))


def project_back(dy_TO: Tensor, low: LowRank) -> Tensor:
    """d_low (T, W): each slot's s B^T times the gradients of its tokens' outputs; in dy's tail where low rides."""
    d_low_TW = _low_room(dy_TO, low)
    if not low.plain:
        for one in classes(low, stacked=False):
            fused.project_back(dy_TO, d_low_TW, one.bounds, one.rank, one.routes, one.table_SF)
        return d_low_TW
    for part in low.parts:
        rows = slice(part.start, part.stop)
        for m in part.group.members:
            out = d_low_TW[rows, m.rank_start : m.rank_stop]
            with threads_for(out.shape[0] * m.b_OR.numel()):
                torch.addmm(out, dy_TO[rows, m.out_start : m.out_stop], m.b_OR, beta=0, alpha=m.scale, out=out)
    return d_low_TW


def add_gradient_b(dy_TO: Tensor, low_TW: Tensor, low: LowRank) -> None:
    """dB += s dy^T low, into each group's buffer, in fp32."""
    if low.fused:
        for one in classes(low, stacked=False):
            gradient.add_gradient(dy_TO, low_TW, one.bounds, one.rank, one.routes, one.table_SF, inputs=False)
        return
    for part in low.parts:
        rows = slice(part.start, part.stop)
        for m in part.group.members:
            if m.grad_b_OR is not None:
                dy = dy_TO[rows, m.out_start : m.out_stop]
                _accumulate(m.grad_b_OR, dy.t(), low_TW[rows, m.rank_start : m.rank_stop], m.scale)


def add_gradient_a(x_TD: Tensor, d_low_TW: Tensor, low: LowRank) -> None:
    """dA += d_low^T drop(x), into each group's buffer, in fp32."""
    if low.fused:
        bounds = (0, x_TD.shape[1])
        for one in classes(low, stacked=True):
            gradient.add_gradient(x_TD, d_low_TW, bounds, one.width, one.routes, one.table_SF, inputs=True)
        return
    for part in low.parts:
        if part.group.grad_a_RD is not None:
            d_low = d_low_TW[part.start : part.stop, : part.group.a_RD.shape[0]]
            _accumulate(part.group.grad_a_RD, d_low.t(), _dropped(x_TD[part.start : part.stop], part))


def _add(y_TO: Tensor, addend: Addend) -> None:
    """Add the term in place, in a pass of its own."""
    low, back = addend.low, addend.back
    assert addend.up_to is None, "only some slots' terms are missing"
    if not low.plain:
        bounds = (0, y_TO.shape[1]) if back else low.bounds
        for one in classes(low, stacked=back):
            rank = one.width if back else one.rank
            fused.add(y_TO, addend.low_TW, bounds, rank, one.routes, one.table_SF, back=back)
        return
    for part, rows_TO, rows_TW in zip(low.parts, low.rows(y_TO), low.rows(addend.low_TW), strict=True):
        if back:
            _add_back(rows_TO, rows_TW, part)
        else:
            _add_forward(rows_TO, rows_TW, part.group, low.widths)


def _add_forward(rows_TO: Tensor, rows_TW: Tensor, group: LoraGroup, widths: tuple[int, ...]) -> None:
    """One part's rows of y and of low."""
    outs = rows_TO.split_with_sizes(widths, 1) if len(widths) > 1 else (rows_TO,)
    lows = rows_TW.split_with_sizes((*group.ranks, rows_TW.shape[1] - sum(group.ranks)), 1)
    for m, low in zip(group.members, lows, strict=False):
        with threads_for(low.shape[0] * m.b_RO.numel()):
            outs[m.index].addmm_(low, m.b_RO, alpha=m.scale)


def _add_back(rows_TD: Tensor, rows_TW: Tensor, part: LoraPart) -> None:
    group = part.group
    d_low = rows_TW[:, : group.a_RD.shape[0]]
    if part.draw_T is None:
        with threads_for(d_low.shape[0] * group.a_RD.numel()):
            rows_TD.addmm_(d_low, group.a_RD)
        return
    keep = keep_mask(part.draw_T, group.salt, rows_TD.shape[-1], group.dropout)
    rows_TD.addcmul_(d_low @ group.a_RD, keep.to(rows_TD.dtype), value=1.0 / (1.0 - group.dropout))


def _dropped(x: Tensor, part: LoraPart) -> Tensor:
    """One part's rows of x, as A takes them."""
    return x if part.draw_T is None else dropout(x, part.draw_T, part.group.salt, part.group.dropout)


def _accumulate(buffer: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """buffer += scale * left @ right, in fp32 whatever the operands are."""
    with threads_for(left.numel() * right.shape[1]):
        if buffer.dtype == left.dtype:
            buffer.addmm_(left, right, alpha=scale)
        else:
            buffer.add_(left @ right, alpha=scale)
