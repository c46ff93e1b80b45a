"""The output head and the loss in one step, with the gradient made in the forward; logits are never stored.

    nll[l] = logsumexp(W h[l]) - (W h[l])[label[l]],     loss = sum_l c[l] * nll[l]
    dh[l]  = c[l] * (softmax(W h[l]) - onehot(label[l])) W

The coefficients c carry the normalisation (1 / supervised tokens of the slot's whole step), so that any split of a step
into micro-batches adds up to the same gradient.
Shape legend: L labelled tokens, D hidden, V vocabulary. W is frozen. This module knows no masks: every row has a label.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# Bytes of one chunk of logits: large enough for full matrix speed, small beside the activations.
_CHUNK_BYTES = 128 * 1024 * 1024


def linear_cross_entropy_reference(h_LD: Tensor, head_VD: Tensor, labels_L: Tensor, coefficient_L: Tensor) -> Tensor:
    """The formula in plain torch; a scalar."""
    logits = functional.linear(h_LD, head_VD)
    nll = functional.cross_entropy(logits.to(coefficient_L.dtype), labels_L, reduction="none")
    return (coefficient_L * nll).sum()


def _chunk_rows(vocab: int) -> int:
    return max(64, _CHUNK_BYTES // (4 * vocab))


def _chunk_nll(h: Tensor, head_VD: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(nll, logits in at least fp32, logsumexp) of some rows."""
    logits = functional.linear(h, head_VD)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    lse = torch.logsumexp(logits, dim=-1)
    return lse - logits.gather(1, labels[:, None]).squeeze(1), logits, lse


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_LD: Tensor, head_VD: Tensor, labels_L: Tensor, coefficient_L: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows = _chunk_rows(head_VD.shape[0])
        grad_LD = torch.empty_like(h_LD)
        nll_L = torch.empty(h_LD.shape[0], dtype=coefficient_L.dtype, device=h_LD.device)
        for start in range(0, h_LD.shape[0], rows):
            part = slice(start, start + rows)
            labels = labels_L[part]
            nll_L[part], logits, lse = _chunk_nll(h_LD[part], head_VD, labels)
            p = logits.sub_(lse[:, None]).exp_()
            p.scatter_add_(1, labels[:, None], p.new_full((labels.shape[0], 1), -1.0))
            p.mul_(coefficient_L[part, None].to(p.dtype))
            grad_LD[part] = p.to(h_LD.dtype) @ head_VD
        ctx.save_for_backward(grad_LD)
        ctx.mark_non_differentiable(nll_L)
        return (coefficient_L * nll_L).sum(), nll_L

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_LD,) = ctx.saved_tensors
        return grad_LD * grads[0].to(grad_LD.dtype), None, None, None


def linear_cross_entropy(
    h_LD: Tensor, head_VD: Tensor, labels_L: Tensor, coefficient_L: Tensor
) -> tuple[Tensor, Tensor]:
    """(loss, nll_L): the weighted sum, and each token's negative log likelihood in nats (not differentiable).

    Without a labelled token the loss is 0, not NaN. Under no_grad only the likelihoods are computed.
    """
    if torch.is_grad_enabled() and h_LD.requires_grad:
        loss, nll_L = _LinearCrossEntropy.apply(h_LD, head_VD, labels_L, coefficient_L)  # type: ignore[misc]
        return loss, nll_L
    rows = _chunk_rows(head_VD.shape[0])
    pieces = [_chunk_nll(h_LD[i : i + rows], head_VD, labels_L[i : i + rows])[0] for i in range(0, h_LD.shape[0], rows)]
    nll_L = torch.cat(pieces) if pieces else coefficient_L.new_zeros(0)
    return (coefficient_L * nll_L).sum(), nll_L
