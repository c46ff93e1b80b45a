"""The gated feed-forward's activation.

    y = silu(g) * u,   silu(g) = g / (1 + exp(-g)),   with [g, u] the two halves of one tensor

Source: Shazeer, 2020 (GLU variants). Shape legend: T tokens, F feed-forward features. This module knows no weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def swiglu_reference(gate_up_TF2: Tensor) -> Tensor:
    """The formula in plain torch: (T, 2F) -> (T, F)."""
    gate, up = gate_up_TF2.chunk(2, dim=-1)
    return functional.silu(gate) * up


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_TF2: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_TF2)
        gate, up = gate_up_TF2.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # d silu(g) = sig(g) * (1 + g * (1 - sig(g))).
        (gate_up_TF2,) = ctx.saved_tensors
        gate, up = gate_up_TF2.chunk(2, dim=-1)
        dy = grads[0]
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        out = torch.empty_like(gate_up_TF2)
        d_gate, d_up = out.chunk(2, dim=-1)
        torch.mul(dy, silu, out=d_up)
        slope = silu.mul_(1 - sigmoid).add_(sigmoid)
        torch.mul(slope.mul_(up), dy, out=d_gate)
        return out


def swiglu(gate_up_TF2: Tensor) -> Tensor:
    """(T, 2F) -> (T, F), saving only its input."""
    return _SwiGlu.apply(gate_up_TF2)  # type: ignore[no-any-return]
