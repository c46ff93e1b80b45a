"""Root-mean-square normalisation.

    y = w * x / sqrt(mean(x^2) + eps)

Source: Zhang & Sennrich, 2019. Shape legend: T tokens, D features (the last dimension; any number before it).
The gain w is frozen: there is no gradient for it. This module knows no layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rms_norm_reference(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The formula in plain torch, in fp32, rounded to x's dtype before the gain (as transformers does)."""
    x = x_TD.float() if x_TD.dtype in (torch.bfloat16, torch.float16) else x_TD
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return weight_D * y.to(x_TD.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x = x_TD.float() if x_TD.dtype in (torch.bfloat16, torch.float16) else x_TD
        inverse_T1 = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x_TD, weight_D, inverse_T1)
        return (x * inverse_T1).to(x_TD.dtype).mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # With n = x * inv and g = dy * w:  dx = inv * (g - n * mean(g * n)).
        x_TD, weight_D, inverse_T1 = ctx.saved_tensors
        normed = x_TD * inverse_T1
        g = grads[0] * weight_D
        mean_T1 = (g * normed).mean(-1, keepdim=True)
        return g.addcmul_(normed, mean_T1.to(normed.dtype), value=-1.0).mul(inverse_T1).to(x_TD.dtype), None, None


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension; same shape and dtype as x. Gradient for x only."""
    return _RmsNorm.apply(x_TD, weight_D, eps)  # type: ignore[no-any-return]
