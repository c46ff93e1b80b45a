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
from tenon.kernels.low_rank import Sum


def swiglu_reference(gate_up_TF2: Tensor) -> Tensor:
    """The formula in plain torch: (T, 2F) -> (T, F)."""
    gate, up = gate_up_TF2.chunk(2, dim=-1)
    return functional.silu(gate) * up


def swiglu(gate_up: Sum, *, fuse: bool) -> Tensor:
    """(T, 2F) -> (T, F), a new tensor. fuse: one kernel adds the low-rank term while it reads, and leaves it unadded
    for the backward; otherwise the sum is settled.
    """
    if fuse:
        return fused.swiglu(gate_up)
    gate, up = gate_up.settled().chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def swiglu_backward(dh: Sum, gate_up: Sum, *, fuse: bool) -> tuple[Tensor, Tensor]:
    """(d_gate_up, h): the gradient, and the activation made again. Both arguments' own tensors are overwritten."""
    if fuse:
        return fused.swiglu_backward(dh, gate_up)
    dh_TF = dh.settled()
    gate, up = gate_up.settled().chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    h_TF = silu * up
    d_gate_up = torch.empty_like(gate_up.y_TO)
    d_gate, d_up = d_gate_up.chunk(2, dim=-1)
    torch.mul(dh_TF, silu, out=d_up)
    slope = silu.mul_(1 - sigmoid).add_(sigmoid)
    torch.mul(slope.mul_(up), dh_TF, out=d_gate)
    return d_gate_up, h_TF
