"""The head and the loss: softmax and its gradient over real vocabularies, in one chunk of logits and in several."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tenon.kernels import linear_cross_entropy_triton
from tenon.kernels.linear_cross_entropy import loss_and_gradient
from tests.gpu.kit import Draw, Judge, each, fits_here

pytestmark = pytest.mark.usefixtures("poisoned")
# Llama 3, Qwen 2.5, GPT-2, and one that is shorter than a block.
VOCABULARIES = {128_256: 33, 151_936: 1, 50_257: 9, 97: 65}


def labels_of(rows: int, vocab: int, device: torch.device) -> Tensor:
    """Random ones, the first and the last of the vocabulary among them."""
    labels = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(rows))
    labels[0], labels[-1] = 0, vocab - 1
    return labels.to(device)


def weights_of(rows: int, draw: Draw, dtype: torch.dtype) -> Tensor:
    """What each label counts for; in fp16 times a loss scale, or gradients fall below its range."""
    return draw(rows, dtype=torch.float32).abs() * (1024.0 if dtype == torch.float16 else 1.0) / rows


def exact_softmax(logits_LV: Tensor, labels_L: Tensor, weights_L: Tensor) -> tuple[Tensor, Tensor]:
    """(nll, gradient of the logits) in float64."""
    log_p = functional.log_softmax(logits_LV.double(), dim=-1)
    onehot = functional.one_hot(labels_L, logits_LV.shape[1])
    return -log_p.gather(1, labels_L[:, None])[:, 0], weights_L.double()[:, None] * (log_p.exp() - onehot)


@pytest.mark.parametrize("spread", [1.0, 20.0])
@pytest.mark.parametrize(("vocab", "dtype"), each(VOCABULARIES, (50_257, 97)))
def test_softmax_and_its_gradient(
    vocab: int, spread: float, dtype: torch.dtype, device: torch.device, judge: Judge
) -> None:
    """spread 20: nearly all of the probability lies on one token."""
    rows = VOCABULARIES[vocab]
    fits_here(rows, vocab)
    draw = Draw(rows, dtype, device)
    wide_LX = draw(rows, vocab + 64, scale=spread)
    logits_LV, labels_L = wide_LX[:, :vocab], labels_of(rows, vocab, device)
    weights_L = weights_of(rows, draw, dtype)
    nll, gradient = exact_softmax(logits_LV, labels_L, weights_L)
    behind, nll_L = wide_LX[:, vocab:].clone(), torch.full((rows,), float("nan"), device=device)
    linear_cross_entropy_triton.softmax_gradient(logits_LV, labels_L, weights_L, nll_L)
    # In fp32 the exponential is the larger error.
    judge("softmax_gradient", logits_LV, gradient, roundings=4 if dtype == torch.float32 else 1)
    judge("softmax_gradient nll", nll_L, nll, roundings=4)
    assert torch.equal(wide_LX[:, vocab:], behind)


@pytest.mark.parametrize(("rows", "dtype"), each([1, 40, 1500], (40,)))
def test_loss_and_gradient(rows: int, dtype: torch.dtype, device: torch.device, judge: Judge) -> None:
    """1,500 rows of this vocabulary are two chunks of logits in half precision."""
    vocab, hidden = (128_256, 128) if rows != 40 else (50_257, 576)
    fits_here(rows, vocab)
    draw = Draw(rows, dtype, device)
    h_LD, head_VD = draw(rows, hidden), draw(vocab, hidden, scale=0.1)
    labels_L, weights_L = labels_of(rows, vocab, device), weights_of(rows, draw, dtype)
    nll_L, dh_LD = loss_and_gradient(h_LD, head_VD, labels_L, weights_L, fuse=True)
    exact_nll, exact_dh = [], []
    for part in range(0, rows, 250):
        some = slice(part, part + 250)
        nll, gradient = exact_softmax(h_LD[some].double() @ head_VD.double().t(), labels_L[some], weights_L[some])
        exact_nll.append(nll)
        exact_dh.append(gradient @ head_VD.double())
    # Each logit is rounded, and its probability with it; then each probability.
    judge("loss_and_gradient nll", nll_L, torch.cat(exact_nll), dtype=dtype)
    judge("loss_and_gradient dh", dh_LD, torch.cat(exact_dh), roundings=6)
