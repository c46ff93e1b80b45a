"""The Triton kernels of `swiglu`. A program owns a block of features and walks over a run of one slot's tokens.

So it holds the slot's matrices for its features while it walks, adds the low-rank terms of gate, up and dh as it reads
them, and on the way back sums up the gradients of the three matrices that meet h, d_gate and d_up: those two tensors
are not read again for it, and h is never written. Slots of like rank share a launch (`low_rank_classes`); those of a
rank that no program can hold have their terms added, and their gradients summed, by kernels that take it a part at a
time. Shape legend as in `swiglu`.
"""

# In a kernel, what a flag leaves unbound is never compiled.
# pyright: reportPossiblyUnboundVariable=false, reportUnboundVariable=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tenon.kernels import swiglu_few_triton as few
from tenon.kernels.blocks_triton import bits_to_float, keep, matrix_at, member_at, ranks_at, site_at
from tenon.kernels.gpu import ceil_div, jit, power_of_two, tl
from tenon.kernels.low_rank import Addend, Sum, add_gradient_a, add_gradient_b
from tenon.kernels.low_rank_classes import RankClass, class_size, classes, of_class, rank_classes, slot_ranks
from tenon.kernels.low_rank_gradient_triton import add_to_gradient, gradient_facts, partial_sums, reduce_gradient


@jit
def _run(runs_ptr, tokens, ROUTED: tl.constexpr, RUN: tl.constexpr):
    """(slot, first token, the one after the last) of this program."""
    if ROUTED:
        run = runs_ptr + 3 * tl.program_id(1)
        return tl.load(run), tl.load(run + 1), tl.load(run + 2)
    begin = tl.program_id(1).to(tl.int64) * RUN
    return begin * 0 - 1, begin, tl.minimum(begin + RUN, tokens)


@jit
def _low(low_ptr, stride, rows, row_mask, start, rank, RANK: tl.constexpr):
    """(rows, RANK) of the low-rank activations."""
    r = tl.arange(0, RANK)
    mask = row_mask[:, None] & (r < rank)[None, :]
    return tl.load(low_ptr + rows[:, None] * stride + start + r[None, :], mask=mask, other=0.0)


@jit
def _rank(at, slot):
    """A rank of these fields; 0 where there is no slot."""
    return tl.multiple_of(tl.where(slot >= 0, tl.load(at + 2), 0).to(tl.int32), 8)


@jit
def _module_b(site, member, slot, f, width, like_ptr, RANK: tl.constexpr):
    """(s B^T (RANK, features) as it is, rank, place of its ranks, s) of gate or up; nothing where there is no slot."""
    at = member_at(site, member)
    rank = _rank(at, slot)
    r = tl.arange(0, RANK)
    b_ptr = matrix_at(tl.load(at), like_ptr)
    mask = (r < rank)[:, None] & (f < width)[None, :]
    b = tl.load(b_ptr + f[None, :].to(tl.int64) * rank + r[:, None], mask=mask, other=0.0)
    return b, rank, ranks_at(at + 3), bits_to_float(tl.load(at + 4))


@jit
def _swiglu_kernel(
    gate_up_ptr,
    gate_up_stride,
    h_ptr,
    h_stride,
    low_ptr,
    low_stride,
    runs_ptr,
    table_ptr,
    tokens,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    ROUTED: tl.constexpr,
    LOW: tl.constexpr,
    RUN: tl.constexpr,
    STAGES: tl.constexpr,
):
    slot, begin, end = _run(runs_ptr, tokens, ROUTED, RUN)
    f = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    if LOW:
        site = site_at(table_ptr, tl.maximum(slot, 0))
        b_gate, rank_gate, start_gate, s_gate = _module_b(site, 0, slot, f, width, low_ptr, RANK)
        b_up, rank_up, start_up, s_up = _module_b(site, 1, slot, f, width, low_ptr, RANK)
    for at in tl.range(begin, end, ROWS, num_stages=STAGES):
        rows = at + tl.arange(0, ROWS)
        row_mask = rows < end
        mask = row_mask[:, None] & (f < width)[None, :]
        gate_at = gate_up_ptr + rows[:, None] * gate_up_stride + f[None, :]
        gate = tl.load(gate_at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_at + width, mask=mask, other=0.0).to(tl.float32)
        if LOW:
            low_gate = _low(low_ptr, low_stride, rows, row_mask, start_gate, rank_gate, RANK)
            low_up = _low(low_ptr, low_stride, rows, row_mask, start_up, rank_up, RANK)
            gate += tl.dot(low_gate, b_gate, input_precision="ieee") * s_gate
            up += tl.dot(low_up, b_up, input_precision="ieee") * s_up
        h = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(h_ptr + rows[:, None] * h_stride + f[None, :], h.to(h_ptr.dtype.element_ty), mask=mask)


@jit
def _swiglu_backward_kernel(
    dh_ptr,
    gate_up_ptr,
    gate_up_stride,
    low_ptr,
    low_stride,
    table_ptr,
    d_low_ptr,
    d_low_stride,
    d_table_ptr,
    chunks_ptr,
    draw_ptr,
    partial_b_ptr,
    partial_a_ptr,
    tokens,
    width,
    ranks_b,
    ranks_a,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    D_RANK: tl.constexpr,
    ROUTED: tl.constexpr,
    LOW: tl.constexpr,
    D_LOW: tl.constexpr,
    ADD_LOW: tl.constexpr,
    ADD_D_LOW: tl.constexpr,
    DROP: tl.constexpr,
    DIRECT: tl.constexpr,
    KEEP_H: tl.constexpr,
    RUN: tl.constexpr,
    STAGES: tl.constexpr,
):
    slot, begin, end = _run(chunks_ptr, tokens, ROUTED, RUN)
    f = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = f < width
    element = dh_ptr.dtype.element_ty
    if LOW:
        site = site_at(table_ptr, tl.maximum(slot, 0))
        b_gate, rank_gate, start_gate, s_gate = _module_b(site, 0, slot, f, width, low_ptr, RANK)
        b_up, rank_up, start_up, s_up = _module_b(site, 1, slot, f, width, low_ptr, RANK)
        sum_gate = tl.zeros((RANK, COLUMNS), dtype=tl.float32)
        sum_up = tl.zeros((RANK, COLUMNS), dtype=tl.float32)
    if D_LOW:
        d_site = site_at(d_table_ptr, tl.maximum(slot, 0))
        d_rank = _rank(d_site, slot)
        r = tl.arange(0, D_RANK)
        a_ptr = matrix_at(tl.load(d_site), d_low_ptr)
        a_mask = (r < d_rank)[:, None] & inside[None, :]
        a = tl.load(a_ptr + r[:, None].to(tl.int64) * width + f[None, :], mask=a_mask, other=0.0)
        sum_a = tl.zeros((D_RANK, COLUMNS), dtype=tl.float32)
        if DROP:
            salt, threshold = tl.load(d_site + 5), tl.load(d_site + 3)
            keep_scale = bits_to_float(tl.load(d_site + 4))
    for at in tl.range(begin, end, ROWS, num_stages=STAGES):
        rows = at + tl.arange(0, ROWS)
        row_mask = rows < end
        mask = row_mask[:, None] & inside[None, :]
        gate_at = gate_up_ptr + rows[:, None] * gate_up_stride + f[None, :]
        dh = tl.load(dh_ptr + rows[:, None] * width + f[None, :], mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_at + width, mask=mask, other=0.0).to(tl.float32)
        if LOW:
            low_gate = _low(low_ptr, low_stride, rows, row_mask, start_gate, rank_gate, RANK)
            low_up = _low(low_ptr, low_stride, rows, row_mask, start_up, rank_up, RANK)
        if ADD_LOW:
            gate += tl.dot(low_gate, b_gate, input_precision="ieee") * s_gate
            up += tl.dot(low_up, b_up, input_precision="ieee") * s_up
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigmoid
        if D_LOW:
            d_low = _low(d_low_ptr, d_low_stride, rows, row_mask, 0, d_rank, D_RANK)
            h = silu * up
            if DROP:
                keys = tl.load(draw_ptr + rows, mask=row_mask, other=0)
                stays = keep(keys, salt, f, threshold)
                h = tl.where(stays, h * keep_scale, 0.0)
            if ADD_D_LOW:
                term = tl.dot(d_low, a, input_precision="ieee")
                if DROP:
                    term = tl.where(stays, term * keep_scale, 0.0)
                dh += term
            sum_a = tl.dot(tl.trans(d_low), h.to(element), sum_a, input_precision="ieee")
        d_gate = (dh * up * (sigmoid + silu * (1.0 - sigmoid))).to(element)
        d_up = (dh * silu).to(element)
        tl.store(gate_at, d_gate, mask=mask)
        tl.store(gate_at + width, d_up, mask=mask)
        if KEEP_H:
            tl.store(dh_ptr + rows[:, None] * width + f[None, :], (silu * up).to(element), mask=mask)
        if LOW:
            sum_gate = tl.dot(tl.trans(low_gate), d_gate, sum_gate, input_precision="ieee")
            sum_up = tl.dot(tl.trans(low_up), d_up, sum_up, input_precision="ieee")
    if LOW:
        _finish(partial_b_ptr, site, 0, slot, sum_gate, f, 0, width, 2 * width, ranks_b, RANK, False, DIRECT)
        _finish(partial_b_ptr, site, 1, slot, sum_up, f, width, width, 2 * width, ranks_b, RANK, False, DIRECT)
    if D_LOW:
        _finish(partial_a_ptr, d_site, 0, slot, sum_a, f, 0, width, width, ranks_a, D_RANK, True, DIRECT)


@jit
def _finish(
    partial_ptr,
    site,
    member,
    slot,
    acc,
    f,
    first,
    width,
    columns,
    ranks,
    RANK: tl.constexpr,
    INPUTS: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """Hand in this program's part of one gradient: to the gradient itself, or to its chunk's place."""
    if slot >= 0:
        r = tl.arange(0, RANK)
        address, rank, _, scale = gradient_facts(site, member, INPUTS)
        if DIRECT:
            if address != 0:
                add_to_gradient(address, acc * scale, r, f, rank, width, INPUTS)
        else:
            target = partial_ptr + (tl.program_id(1) * ranks + r[:, None]).to(tl.int64) * columns
            mask = (r < ranks)[:, None] & (f < width)[None, :]
            tl.store(target + (first + f)[None, :], acc * scale, mask=mask)


# Tokens of one program where no slot says how far it may walk.
_RUN = 256
# Up to here a GPU is not full, and longer blocks of tokens hide more of the memory's latency.
_FEW_TOKENS = 2048
# Ranks that a program can hold beside its blocks, and those beside which its blocks may be wide.
_MOST_HELD = 64
_FEW_HELD = 32


def swiglu(gate_up: Sum, h_TF: Tensor) -> None:
    """See `swiglu.swiglu`; written into h_TF."""
    addend = gate_up.addend
    if addend is None:
        _forward(gate_up.y_TO, h_TF, None, None)
        return
    if addend.low.few is not None:
        few.swiglu(gate_up.y_TO, addend, h_TF)
        return
    for low in classes(addend.low, stacked=False):
        mine = replace(addend, low=low)
        if _is_wide(mine):
            Sum(gate_up.y_TO, mine).settled()
            gate_up.addend = replace(addend, up_to=_MOST_HELD)
        _forward(gate_up.y_TO, h_TF, low.routes, None if _is_wide(mine) else mine)


def _forward(gate_up_TF2: Tensor, h_TF: Tensor, routes: Any, addend: Addend | None) -> None:
    """Over the tokens of these routes, with a term or without."""
    tokens, width = h_TF.shape
    low_TW = h_TF if addend is None else addend.low_TW
    rank = 16 if addend is None else power_of_two(addend.low.rank, least=16)
    columns = 128 if rank <= _FEW_HELD else 64
    runs = ceil_div(tokens, _RUN) if routes is None else routes.tiles_N3.shape[0]
    _swiglu_kernel[(ceil_div(width, columns), runs)](
        gate_up_TF2,
        gate_up_TF2.stride(0),
        h_TF,
        h_TF.stride(0),
        low_TW,
        low_TW.stride(0),
        h_TF if routes is None else routes.tiles_N3,
        h_TF if addend is None else addend.low.table_SF,
        tokens,
        width,
        ROWS=16,
        COLUMNS=columns,
        RANK=rank,
        ROUTED=routes is not None,
        LOW=addend is not None,
        RUN=_RUN,
        STAGES=3,
        num_warps=4,
    )


@dataclass(frozen=True, slots=True)
class _Way:
    """One launch of the backward pass. routes: its tokens, None for all. back, ahead: whose gradients it sums up.

    adds_back, adds_ahead: whether dh, gate and up lack their terms. keep_h: write h over dh.
    """

    routes: Any
    back: Addend | None
    ahead: Addend | None
    adds_back: bool = False
    adds_ahead: bool = False
    keep_h: bool = False


def swiglu_backward(dh: Sum, gate_up: Sum, back: Addend | None, ahead: Addend | None) -> Tensor:
    """See `swiglu.swiglu_backward`."""
    for routes, mine_back, mine_ahead in _by_class(back, ahead):
        _of_class_backward(dh, gate_up, routes, mine_back, mine_ahead)
    dh.addend = gate_up.addend = None
    return gate_up.y_TO


def _by_class(back: Addend | None, ahead: Addend | None) -> list[tuple[Any, Addend | None, Addend | None]]:
    """(tokens, back, ahead) of each class of the slots' ranks at gate and up, and at down."""
    either = back or ahead
    if either is None or either.low.routes is None:
        return [(None, back, ahead)]
    ranks = [{} if x is None else slot_ranks(x.low, stacked=False) for x in (ahead, back)]
    slots = ranks[0] | ranks[1]
    sizes = {slot: (class_size(ranks[0].get(slot, 0)), class_size(ranks[1].get(slot, 0))) for slot in slots}
    found = rank_classes(either.low.routes, sizes)
    return [(one.routes, _of_class(back, one), _of_class(ahead, one)) for one in found]


def _of_class(addend: Addend | None, one: RankClass) -> Addend | None:
    low = None if addend is None else of_class(addend.low, one)
    return None if addend is None or low is None else replace(addend, low=low)


def _of_class_backward(dh: Sum, gate_up: Sum, routes: Any, back: Addend | None, ahead: Addend | None) -> None:
    """Large ranks have sums of their own kernels, which take them a part at a time."""
    wide_back, wide_ahead = _is_wide(back), _is_wide(ahead)
    adds_back, adds_ahead = dh.addend is not None, gate_up.addend is not None
    if wide_back and adds_back:
        Sum(dh.y_TO, back).settled()
    if wide_ahead and gate_up.addend is not None and gate_up.addend.up_to is None:
        Sum(gate_up.y_TO, ahead).settled()
    held_back, held_ahead = None if wide_back else back, None if wide_ahead else ahead
    way = _Way(
        routes,
        held_back,
        held_ahead,
        adds_back=adds_back and held_back is not None,
        adds_ahead=adds_ahead and held_ahead is not None,
        keep_h=wide_back,
    )
    _backward(dh.y_TO, gate_up.y_TO, way)
    if wide_back and back is not None:
        add_gradient_a(dh.y_TO, back.low_TW, back.low)
    if wide_ahead and ahead is not None:
        add_gradient_b(gate_up.y_TO, ahead.low_TW, ahead.low)


def _is_wide(addend: Addend | None) -> bool:
    return addend is not None and addend.low.rank > _MOST_HELD


def _backward(dh_TF: Tensor, gate_up_TF2: Tensor, way: _Way) -> None:
    """One launch, and another that adds up the chunks' parts of the gradients where there are several."""
    tokens, width = dh_TF.shape
    routes, back, ahead = way.routes, way.back, way.ahead
    rank = 16 if ahead is None else power_of_two(ahead.low.rank, least=16)
    d_rank = 16 if back is None else power_of_two(back.low.rank, least=16)
    columns = 64 if max(rank, d_rank) <= _FEW_HELD else 32
    runs = ceil_div(tokens, _RUN) if routes is None else routes.chunks_C3.shape[0]
    partial_b = None if ahead is None else partial_sums(dh_TF, ahead.low.rank, 2 * width, routes)
    partial_a = None if back is None else partial_sums(dh_TF, back.low.rank, width, routes)
    drop = back is not None and routes.draw_T is not None
    low_TW = dh_TF if ahead is None else ahead.low_TW
    d_low_TW = dh_TF if back is None else back.low_TW
    _swiglu_backward_kernel[(ceil_div(width, columns), runs)](
        dh_TF,
        gate_up_TF2,
        gate_up_TF2.stride(0),
        low_TW,
        low_TW.stride(0),
        dh_TF if ahead is None else ahead.low.table_SF,
        d_low_TW,
        d_low_TW.stride(0),
        dh_TF if back is None else back.low.table_SF,
        dh_TF if routes is None else routes.chunks_C3,
        routes.draw_T if drop else dh_TF,
        dh_TF if partial_b is None else partial_b,
        dh_TF if partial_a is None else partial_a,
        tokens,
        width,
        0 if ahead is None else ahead.low.rank,
        0 if back is None else back.low.rank,
        ROWS=16 if tokens > _FEW_TOKENS else 32,
        COLUMNS=columns,
        RANK=rank,
        D_RANK=d_rank,
        ROUTED=routes is not None,
        LOW=ahead is not None,
        D_LOW=back is not None,
        ADD_LOW=way.adds_ahead,
        ADD_D_LOW=way.adds_back,
        DROP=drop,
        DIRECT=routes is None or routes.whole,
        KEEP_H=way.keep_h,
        RUN=_RUN,
        STAGES=3,
        num_warps=4,
    )
    _reduce(partial_a, back, (0, width), inputs=True)
    _reduce(partial_b, ahead, (0, width, 2 * width), inputs=False)


def _reduce(partial: Tensor | None, addend: Addend | None, bounds: tuple[int, ...], *, inputs: bool) -> None:
    if partial is not None and addend is not None and addend.low.table_SF is not None:
        reduce_gradient(partial, bounds, addend.low.routes, addend.low.table_SF, inputs=inputs)
