"""Root-mean-square normalisation, with the sum before it.

    x = x' + y + s B low                 (the residual stream and a layer's addition; see `low_rank.Sum`)
    n = w * x / sqrt(mean(x^2) + eps)

and backward, with g = dn * w and inv = 1 / sqrt(mean(x^2) + eps):

    dx = residual + inv * (g - x * inv^2 * mean(g * x))

Source: Zhang & Sennrich, 2019. Shape legend: T tokens, D features (the last dimension; any number before it).
The gain w is frozen: there is no gradient for it. This module knows no layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tenon.kernels import rms_norm_triton as fused
from tenon.kernels.fp8 import Fp8Rows, quantise_rows_reference
from tenon.kernels.low_rank import LowRank, Sum, room
from tenon.kernels.threads import NORM_ELEMENT, threads_for

_NARROW = (torch.bfloat16, torch.float16)


def rms_norm_reference(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The formula in plain torch, in fp32, rounded to x's dtype before the gain (as transformers does)."""
    x = x_TD.float() if x_TD.dtype in _NARROW else x_TD
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return weight_D * y.to(x_TD.dtype)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension; same shape and dtype as x, a new tensor."""
    x = x_TD.float() if x_TD.dtype in _NARROW else x_TD
    inverse_T1 = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x * inverse_T1).to(x_TD.dtype).mul_(weight_D)


def rms_norm_backward(dn_TD: Tensor, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """dx of `rms_norm` alone (no residual), a new tensor."""
    x = x_TD.float() if x_TD.dtype in _NARROW else x_TD
    inverse_T1 = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normed = x * inverse_T1
    g = dn_TD * weight_D
    mean_T1 = (g * normed).mean(-1, keepdim=True)
    return g.to(x.dtype).addcmul(normed, mean_T1, value=-1.0).mul_(inverse_T1).to(x_TD.dtype)


@dataclass(frozen=True, slots=True)
class Quantised:
    """Where a result goes a second time, in fp8, for a product that takes it so. column_scale_D: see `kernels.fp8`."""

    rows: Fp8Rows
    column_scale_D: Tensor | None = None


def add_norm(
    x_TD: Tensor,
    update: Sum | None,
    weight_D: Tensor,
    eps: float,
    *,
    fuse: bool,
    reader: LowRank | None = None,
    quantised: Quantised | None = None,
    added: LowRank | None = None,
) -> tuple[Tensor, Tensor]:
    """(x, n): the stream after the update, and it normalised. The update's own tensor is overwritten by x.

    update None: x stays the tensor it is. fuse: one kernel instead of several; it adds the low-rank term itself, and
    leaves room behind n for the low-rank activations of its reader. quantised: n in fp8 too. added: without an update,
    the term that x was made with, so that n gets the bits that it had then.
    """
    if fuse:
        return fused.add_norm(x_TD, update, weight_D, eps, room(x_TD, x_TD.shape[1], reader), quantised, added)
    summed_TD = None if update is None else update.settled()
    with threads_for(NORM_ELEMENT * x_TD.numel()):
        if summed_TD is not None:
            x_TD = summed_TD.add_(x_TD)
        n_TD = rms_norm(x_TD, weight_D, eps)
    _fill(quantised, n_TD)
    return x_TD, n_TD


def add_norm_backward(
    dn: Sum,
    x_TD: Tensor,
    residual_TD: Tensor | None,
    weight_D: Tensor,
    eps: float,
    *,
    fuse: bool,
    reader: LowRank | None = None,
    quantised: Quantised | None = None,
) -> tuple[Tensor, Tensor]:
    """(dx, n): the gradient of the stream, residual_TD being what reaches it past the norm; and n made again.

    dn's own tensor may be overwritten. reader: whose low-rank gradients are to have room behind dx, where it is fused.
    quantised: dx in fp8 too.
    """
    if fuse:
        dx_TD = room(x_TD, x_TD.shape[1], reader)
        return dx_TD, fused.add_norm_backward(dn, x_TD, residual_TD, weight_D, eps, dx_TD, quantised)
    dn_TD = dn.settled()
    with threads_for(2 * NORM_ELEMENT * x_TD.numel()):
        dx_TD = rms_norm_backward(dn_TD, x_TD, weight_D, eps)
        if residual_TD is not None:
            dx_TD.add_(residual_TD)
        n_TD = rms_norm(x_TD, weight_D, eps)
    _fill(quantised, dx_TD)
    return dx_TD, n_TD


def _fill(quantised: Quantised | None, x_TD: Tensor) -> None:
    if quantised is not None:
        rows = quantise_rows_reference(x_TD, quantised.column_scale_D)
        quantised.rows.values_TD.view(torch.uint8).copy_(rows.values_TD.view(torch.uint8))
        quantised.rows.scale_T.copy_(rows.scale_T)
