"""Rotary position embedding, applied to queries and keys.

    y = x * cos + rotate_half(x) * sin,   rotate_half([a, b]) = [-b, a]

The transposed rotation is the same with -sin, so the backward saves nothing of x.
Source: Su et al., 2021 (RoFormer), half-split layout. Shape legend: T tokens, H heads, E head dimension.
cos and sin may be scaled (YaRN's attention factor): the transposed map keeps the scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotary_reference(x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """The formula in plain torch."""
    first, second = x_THE.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x_THE * cos_TE.unsqueeze(1) + rotated * sin_TE.unsqueeze(1)


def _rotate(x_THE: Tensor, cos_T1F: Tensor, sin_T1F: Tensor) -> Tensor:
    first, second = x_THE.chunk(2, dim=-1)
    out = torch.empty_like(x_THE, memory_format=torch.contiguous_format)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos_T1F, out=out_first).addcmul_(second, sin_T1F, value=-1.0)
    torch.mul(second, cos_T1F, out=out_second).addcmul_(first, sin_T1F)
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        half = x_THE.shape[-1] // 2
        cos, sin = cos_TE[:, None, :half], sin_TE[:, None, :half]
        ctx.save_for_backward(cos, sin)
        return _rotate(x_THE, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, -sin), None, None


def rotary(x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Rotate every head of every token by its position's angles; cos and sin repeat their two halves.

    cos and sin are of x's dtype (their tables are computed in fp32).
    """
    return _Rotary.apply(x_THE, cos_TE, sin_TE)  # type: ignore[no-any-return]
