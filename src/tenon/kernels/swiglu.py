"""The gated feed-forward's activation.

    h = silu(g) * u,   silu(g) = g sig(g),   sig(g) = 1 / (1 + exp(-g)),   with [g, u] the two halves of one tensor
    du = dh silu(g),   dg = dh u sig(g) (1 + g (1 - sig(g)))

Source: Shazeer, 2020 (GLU variants). Shape legend: T tokens, F feed-forward features. This module knows no weights.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tenon.kernels import swiglu_triton as fused
from tenon.kernels.low_rank import Addend, LowRank, Sum, add_gradient_a, add_gradient_b, room
from tenon.kernels.threads import SWIGLU_ELEMENT, threads_for


def swiglu_reference(gate_up_TF2: Tensor) -> Tensor:
    """The formula in plain torch: (T, 2F) -> (T, F)."""
    gate, up = gate_up_TF2.chunk(2, dim=-1)
    return functional.silu(gate) * up


def swiglu(gate_up: Sum, *, fuse: bool, reader: LowRank | None = None) -> Tensor:
    """(T, 2F) -> (T, F), a new tensor. fuse: one kernel adds the low-rank term while it reads, and leaves it unadded
    for the backward; otherwise the sum is settled. reader: whose low-rank activations are to have room behind h.
    """
    if fuse:
        h_TF = room(gate_up.y_TO, gate_up.y_TO.shape[1] // 2, reader)
        fused.swiglu(gate_up, h_TF)
        return h_TF
    gate, up = gate_up.settled().chunk(2, dim=-1)
    with threads_for(SWIGLU_ELEMENT * gate.numel()):
        return functional.silu(gate).mul_(up)


def swiglu_backward(dh: Sum, gate_up: Sum, back: Addend | None, ahead: Addend | None, *, fuse: bool) -> Tensor:
    """d_gate_up (T, 2F); and, while h and d_gate_up are at hand, the gradients of the matrices that meet them.

    These are A of what reads h (back: the slots' d_low there) and B of gate and up (ahead: their low-rank activations).
    Both sums' own tensors are overwritten; fused, the result lies in gate_up's.
    """
    if fuse:
        return fused.swiglu_backward(dh, gate_up, back, ahead)
    dh_TF, gate_up_TF2 = dh.settled(), gate_up.settled()
    with threads_for(2 * SWIGLU_ELEMENT * dh_TF.numel()):
        d_gate_up_TF2, h_TF = _backward(dh_TF, gate_up_TF2)
    if back is not None:
        add_gradient_a(h_TF, back.low_TW, back.low)
    if ahead is not None:
        add_gradient_b(d_gate_up_TF2, ahead.low_TW, ahead.low)
    return d_gate_up_TF2


def _backward(dh_TF: Tensor, gate_up_TF2: Tensor) -> tuple[Tensor, Tensor]:
    """(d_gate_up, h)."""
    gate, up = gate_up_TF2.chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    h_TF = silu * up
    d_gate_up = torch.empty_like(gate_up_TF2)
    d_gate, d_up = d_gate_up.chunk(2, dim=-1)
    torch.mul(dh_TF, silu, out=d_up)
    slope = silu.mul_(1 - sigmoid).add_(sigmoid)
    torch.mul(slope.mul_(up), dh_TF, out=d_gate)
    return d_gate_up, h_TF
