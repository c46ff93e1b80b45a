"""The output head and the loss in one step, with the gradient made in the forward; logits are never stored.

    nll[l] = logsumexp(W h[l]) - (W h[l])[label[l]],     loss = sum_l c[l] * nll[l]
    dh[l]  = c[l] * (softmax(W h[l]) - onehot(label[l])) W

The coefficients c carry the normalisation (1 / supervised tokens of the slot's whole step), so that any split of a step
into micro-batches adds up to the same gradient.
Shape legend: L labelled tokens, D hidden, V vocabulary. W is frozen. This module knows no masks: every row has a label.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tenon.kernels import linear_cross_entropy_triton as fused

# Bytes of one chunk of logits: large enough for full matrix speed, small beside the activations.
_CHUNK_BYTES = {False: 128 * 1024 * 1024, True: 256 * 1024 * 1024}


def linear_cross_entropy_reference(h_LD: Tensor, head_VD: Tensor, labels_L: Tensor, coefficient_L: Tensor) -> Tensor:
    """The formula in plain torch; a scalar."""
    logits = functional.linear(h_LD, head_VD)
    nll = functional.cross_entropy(logits.to(coefficient_L.dtype), labels_L, reduction="none")
    return (coefficient_L * nll).sum()


def _chunk_rows(head_VD: Tensor, *, fuse: bool) -> int:
    width = head_VD.element_size() if fuse else 4
    return max(64, _CHUNK_BYTES[fuse] // (width * head_VD.shape[0]))


def _chunk_nll(h: Tensor, head_VD: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(nll, logits in at least fp32, logsumexp) of some rows."""
    logits = functional.linear(h, head_VD)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    lse = torch.logsumexp(logits, dim=-1)
    return lse - logits.gather(1, labels[:, None]).squeeze(1), logits, lse


def _chunk_gradient(h: Tensor, head_VD: Tensor, labels: Tensor, coefficient: Tensor) -> tuple[Tensor, Tensor]:
    """(nll, gradient of the logits in h's dtype) of some rows."""
    nll, logits, lse = _chunk_nll(h, head_VD, labels)
    p = logits.sub_(lse[:, None]).exp_()
    p.scatter_add_(1, labels[:, None], p.new_full((labels.shape[0], 1), -1.0))
    return nll, p.mul_(coefficient[:, None].to(p.dtype)).to(h.dtype)


def loss_and_gradient(
    h_LD: Tensor, head_VD: Tensor, labels_L: Tensor, coefficient_L: Tensor, *, fuse: bool
) -> tuple[Tensor, Tensor]:
    """(nll_L, dh_LD): each token's negative log likelihood in nats, and the gradient of sum_l c[l] nll[l].

    Without a labelled token both are empty. fuse: softmax and its gradient in one kernel, in place of the logits.
    """
    rows = _chunk_rows(head_VD, fuse=fuse)
    grad_LD = torch.empty_like(h_LD)
    nll_L = torch.empty(h_LD.shape[0], dtype=coefficient_L.dtype, device=h_LD.device)
    for start in range(0, h_LD.shape[0], rows):
        part = slice(start, start + rows)
        h, labels, coefficient = h_LD[part], labels_L[part], coefficient_L[part]
        if fuse:
            p = functional.linear(h, head_VD)
            fused.softmax_gradient(p, labels, coefficient, nll_L[part])
        else:
            nll_L[part], p = _chunk_gradient(h, head_VD, labels, coefficient)
        torch.mm(p, head_VD, out=grad_LD[part])
        del p  # or the next chunk would be made beside it
    return nll_L, grad_LD


def token_nll(h_LD: Tensor, head_VD: Tensor, labels_L: Tensor) -> Tensor:
    """nll_L alone, in fp32 or wider: scoring without a gradient."""
    rows = _chunk_rows(head_VD, fuse=False)
    pieces = [_chunk_nll(h_LD[i : i + rows], head_VD, labels_L[i : i + rows])[0] for i in range(0, h_LD.shape[0], rows)]
    return torch.cat(pieces) if pieces else torch.zeros(0, device=h_LD.device)
