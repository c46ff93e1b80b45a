"""The Triton kernels of `swiglu`: the low-rank terms of gate and up (forward) and of dh (backward) are added while they
are read. Shape legend as in `swiglu`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tenon.kernels.gpu import ceil_div, jit, tl
from tenon.kernels.low_rank import Addend, Sum
from tenon.kernels.low_rank_triton import FIELDS, TILE, input_block, member_block, padded_rank, tile_rows


@jit
def _swiglu_kernel(
    gate_up_ptr,
    h_ptr,
    low_ptr,
    low_stride,
    tiles_ptr,
    table_ptr,
    tokens,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    ROUTED: tl.constexpr,
    FIELDS: tl.constexpr,
):
    if ROUTED:
        slot, rows, row_mask = tile_rows(tiles_ptr, ROWS, 64 // ROWS)
    else:
        slot = -1
        rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        row_mask = rows < tokens
    f = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = row_mask[:, None] & (f < width)[None, :]
    gate_at = gate_up_ptr + rows[:, None] * (2 * width) + f[None, :]
    gate = tl.load(gate_at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_at + width, mask=mask, other=0.0).to(tl.float32)
    if ROUTED:
        if slot >= 0:
            site = table_ptr + slot * FIELDS
            gate += member_block(low_ptr, low_stride, rows, row_mask, site, 0, f, f < width, RANK)
            up += member_block(low_ptr, low_stride, rows, row_mask, site, 1, f, f < width, RANK)
    h = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(h_ptr + rows[:, None] * width + f[None, :], h.to(h_ptr.dtype.element_ty), mask=mask)


@jit
def _swiglu_backward_kernel(
    dh_ptr,
    gate_up_ptr,
    low_ptr,
    low_stride,
    table_ptr,
    d_low_ptr,
    d_low_stride,
    d_table_ptr,
    tiles_ptr,
    draw_ptr,
    tokens,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    D_RANK: tl.constexpr,
    ROUTED: tl.constexpr,
    LOW: tl.constexpr,
    D_LOW: tl.constexpr,
    DROP: tl.constexpr,
    FIELDS: tl.constexpr,
):
    if ROUTED:
        slot, rows, row_mask = tile_rows(tiles_ptr, ROWS, 64 // ROWS)
    else:
        slot = -1
        rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        row_mask = rows < tokens
    f = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = row_mask[:, None] & (f < width)[None, :]
    h_at = dh_ptr + rows[:, None] * width + f[None, :]
    gate_at = gate_up_ptr + rows[:, None] * (2 * width) + f[None, :]
    dh = tl.load(h_at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_at + width, mask=mask, other=0.0).to(tl.float32)
    if ROUTED:
        if slot >= 0:
            if LOW:
                site = table_ptr + slot * FIELDS
                gate += member_block(low_ptr, low_stride, rows, row_mask, site, 0, f, f < width, RANK)
                up += member_block(low_ptr, low_stride, rows, row_mask, site, 1, f, f < width, RANK)
            if D_LOW:
                d_site = d_table_ptr + slot * FIELDS
                dh += input_block(d_low_ptr, d_low_stride, rows, row_mask, d_site, f, width, draw_ptr, D_RANK, DROP)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    element = dh_ptr.dtype.element_ty
    tl.store(h_at, (silu * up).to(element), mask=mask)
    tl.store(gate_at, (dh * up * (sigmoid + silu * (1.0 - sigmoid))).to(element), mask=mask)
    tl.store(gate_at + width, (dh * silu).to(element), mask=mask)


_ROWS = 64
_COLUMNS = 64


def _routes(*addends: Addend | None) -> Any:
    return next((addend.low.routes for addend in addends if addend is not None), None)


def _grid(routes: Any, tokens: int, width: int) -> tuple[int, int]:
    rows = ceil_div(tokens, _ROWS) if routes is None else routes.tiles_N3.shape[0] * (TILE // _ROWS)
    return rows, ceil_div(width, _COLUMNS)


def swiglu(gate_up: Sum) -> Tensor:
    """See `swiglu.swiglu`."""
    gate_up_TF2, addend = gate_up.y_TO, gate_up.addend
    tokens, width = gate_up_TF2.shape[0], gate_up_TF2.shape[1] // 2
    h_TF = gate_up_TF2.new_empty(tokens, width)
    routes = _routes(addend)
    low_TW = h_TF if addend is None else addend.low_TW
    _swiglu_kernel[_grid(routes, tokens, width)](
        gate_up_TF2,
        h_TF,
        low_TW,
        low_TW.stride(0),
        h_TF if routes is None else routes.tiles_N3,
        h_TF if addend is None else addend.low.table_SF,
        tokens,
        width,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        RANK=16 if addend is None else padded_rank(addend.low.rank),
        ROUTED=routes is not None,
        FIELDS=FIELDS,
        num_warps=4,
    )
    return h_TF


def swiglu_backward(dh: Sum, gate_up: Sum) -> tuple[Tensor, Tensor]:
    """See `swiglu.swiglu_backward`."""
    dh_TF, gate_up_TF2, back, ahead = dh.y_TO, gate_up.y_TO, dh.addend, gate_up.addend
    tokens, width = dh_TF.shape
    routes = _routes(back, ahead)
    drop = back is not None and routes is not None and routes.draw_T is not None
    low_TW = dh_TF if ahead is None else ahead.low_TW
    d_low_TW = dh_TF if back is None else back.low_TW
    _swiglu_backward_kernel[_grid(routes, tokens, width)](
        dh_TF,
        gate_up_TF2,
        low_TW,
        low_TW.stride(0),
        dh_TF if ahead is None else ahead.low.table_SF,
        d_low_TW,
        d_low_TW.stride(0),
        dh_TF if back is None else back.low.table_SF,
        dh_TF if routes is None else routes.tiles_N3,
        dh_TF if routes is None or not drop else routes.draw_T,
        tokens,
        width,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        RANK=16 if ahead is None else padded_rank(ahead.low.rank),
        D_RANK=16 if back is None else padded_rank(back.low.width),
        ROUTED=routes is not None,
        LOW=ahead is not None,
        D_LOW=back is not None,
        DROP=drop,
        FIELDS=FIELDS,
        num_warps=4,
    )
    dh.addend = gate_up.addend = None
    return gate_up_TF2, dh_TF
