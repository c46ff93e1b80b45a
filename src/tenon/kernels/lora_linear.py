"""A frozen linear map with low-rank additions, several slots in one token stream.

    y[t] = W x[t] + bias + s_slot * B_slot A_slot drop(x[t])      for the tokens t of each slot

One weight W may hold several modules stacked along its outputs (q, k, v; gate, up). Their A matrices are stacked too,
so that one product makes all low-rank activations; each B writes the outputs of its own module.

The gradients of A and B are *added into* the buffers that the part carries (fp32, views of the slot's flat gradient),
and are not returned to autograd: a slot has one flat gradient, and a micro-batch adds to it. The gradient of W does not
exist.

Source: Hu et al., 2021 (LoRA). Shape legend: T tokens, D inputs, O outputs, R ranks of all members together.
This module does not know what a slot is trained for, nor how its matrices are stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tenon.kernels.dropout import dropout, keep_mask


@dataclass(frozen=True, slots=True)
class LoraMember:
    """One module of the stacked weight: b_OR writes outputs [out_start, out_stop) from ranks [rank_start,
    rank_stop).
    """

    b_OR: Tensor
    grad_b_OR: Tensor | None
    out_start: int
    out_stop: int
    rank_start: int
    rank_stop: int
    scale: float


@dataclass(frozen=True, slots=True)
class LoraGroup:
    """One slot's matrices at one stacked weight. Gradients are None when the slot is only used, not trained."""

    a_RD: Tensor
    grad_a_RD: Tensor | None
    members: tuple[LoraMember, ...]
    dropout: float = 0.0
    salt: int = 0


@dataclass(frozen=True, slots=True)
class LoraPart:
    """A group applied to the tokens [start, stop); draw_T holds their dropout keys (None: no dropout)."""

    group: LoraGroup
    start: int
    stop: int
    draw_T: Tensor | None = None


def lora_linear_reference(
    x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None, parts: tuple[LoraPart, ...]
) -> Tensor:
    """The formula in plain torch, out of place, differentiable in x, A and B."""
    y = functional.linear(x_TD, weight_OD, bias_O)
    for part in parts:
        x = x_TD[part.start : part.stop]
        if part.draw_T is not None:
            x = dropout(x, part.draw_T, part.group.salt, part.group.dropout)
        low = x @ part.group.a_RD.t()
        delta = torch.zeros_like(y)
        for m in part.group.members:
            update = m.scale * (low[:, m.rank_start : m.rank_stop] @ m.b_OR.t())
            delta[part.start : part.stop, m.out_start : m.out_stop] = update
        y = y + delta
    return y


def _dropped(x_TD: Tensor, part: LoraPart) -> Tensor:
    x = x_TD[part.start : part.stop]
    return x if part.draw_T is None else dropout(x, part.draw_T, part.group.salt, part.group.dropout)


def _accumulate(buffer: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """buffer += scale * left @ right, in fp32 whatever the operands are."""
    if buffer.dtype == left.dtype:
        buffer.addmm_(left, right, alpha=scale)
    else:
        buffer.add_(left @ right, alpha=scale)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, _anchor: Tensor, weight_OD: Tensor, bias_O: Tensor | None, parts: tuple[LoraPart, ...]
    ) -> Tensor:
        y_TO = functional.linear(x_TD, weight_OD, bias_O)
        lows = [_add_low_rank(y_TO, x_TD, part) for part in parts]
        ctx.save_for_backward(x_TD, weight_OD, *lows)
        ctx.parts = parts
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_OD, *lows = ctx.saved_tensors
        dy_TO = grads[0]
        dx_TD = dy_TO @ weight_OD if ctx.needs_input_grad[0] else None
        for part, low_TR in zip(ctx.parts, lows, strict=True):
            _part_backward(part, x_TD, dy_TO[part.start : part.stop], low_TR, dx_TD)
        return dx_TD, None, None, None, None


def _add_low_rank(y_TO: Tensor, x_TD: Tensor, part: LoraPart) -> Tensor:
    """Add one part's low-rank output into y, in place; returns A drop(x), which the backward needs."""
    low_TR = _dropped(x_TD, part) @ part.group.a_RD.t()
    rows = y_TO[part.start : part.stop]
    for m in part.group.members:
        rows[:, m.out_start : m.out_stop].addmm_(low_TR[:, m.rank_start : m.rank_stop], m.b_OR.t(), alpha=m.scale)
    return low_TR


def _part_backward(part: LoraPart, x_TD: Tensor, dy_TO: Tensor, low_TR: Tensor, dx_TD: Tensor | None) -> None:
    """Add one part's gradients: B and A into their buffers, x's share into dx (in place)."""
    d_low_TR = torch.empty_like(low_TR)
    for m in part.group.members:
        dy = dy_TO[:, m.out_start : m.out_stop]
        torch.mul(dy @ m.b_OR, m.scale, out=d_low_TR[:, m.rank_start : m.rank_stop])
        if m.grad_b_OR is not None:
            _accumulate(m.grad_b_OR, dy.t(), low_TR[:, m.rank_start : m.rank_stop], m.scale)
    if part.group.grad_a_RD is not None:
        _accumulate(part.group.grad_a_RD, d_low_TR.t(), _dropped(x_TD, part))
    if dx_TD is None:
        return
    rows = dx_TD[part.start : part.stop]
    if part.draw_T is None:
        rows.addmm_(d_low_TR, part.group.a_RD)
    else:
        keep = keep_mask(part.draw_T, part.group.salt, x_TD.shape[-1], part.group.dropout)
        rows.addcmul_(d_low_TR @ part.group.a_RD, keep.to(rows.dtype), value=1.0 / (1.0 - part.group.dropout))


def lora_linear(
    x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None, parts: tuple[LoraPart, ...], anchor: Tensor | None
) -> Tensor:
    """(T, D) -> (T, O). With no parts this is a plain linear map.

    anchor: any tensor that requires a gradient, so that autograd visits this node although A and B are not its inputs;
    None when nothing is trained.
    """
    if not parts:
        return functional.linear(x_TD, weight_OD, bias_O)
    if anchor is None:
        y_TO = functional.linear(x_TD, weight_OD, bias_O)
        for part in parts:
            _add_low_rank(y_TO, x_TD, part)
        return y_TO
    return _LoraLinear.apply(x_TD, anchor, weight_OD, bias_O, parts)  # type: ignore[no-any-return]
