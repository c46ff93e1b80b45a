"""The Triton kernel of `linear_cross_entropy`: one row of logits a program, read twice, overwritten by its gradient.

Shape legend: L labelled tokens, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from tenon.kernels.gpu import jit, tl


@jit
def _softmax_gradient_kernel(logits_ptr, stride, labels_ptr, coefficient_ptr, nll_ptr, vocab, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    label = tl.load(labels_ptr + row)
    coefficient = tl.load(coefficient_ptr + row)
    top = tl.full((COLUMNS,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for start in range(0, vocab, COLUMNS):
        v = start + tl.arange(0, COLUMNS)
        x = tl.load(logits_ptr + v, mask=v < vocab, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, x)
        # Lanes that have seen nothing but -inf would make NaN of inf - inf.
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(top - safe) + tl.exp(x - safe)
        top = higher
    peak = tl.max(top, axis=0)
    log_sum = peak + tl.log(tl.sum(total * tl.exp(top - peak), axis=0))
    at_label = tl.load(logits_ptr + label).to(tl.float32)
    tl.store(nll_ptr + row, log_sum - at_label)
    tl.debug_barrier()
    for start in range(0, vocab, COLUMNS):
        v = start + tl.arange(0, COLUMNS)
        x = tl.load(logits_ptr + v, mask=v < vocab, other=-float("inf")).to(tl.float32)
        p = tl.exp(x - log_sum) - tl.where(v == label, 1.0, 0.0)
        tl.store(logits_ptr + v, (p * coefficient).to(logits_ptr.dtype.element_ty), mask=v < vocab)


def softmax_gradient(logits_LV: Tensor, labels_L: Tensor, coefficient_L: Tensor, nll_L: Tensor) -> None:
    """Overwrite the logits with c (softmax - onehot), and write each row's nll (fp32)."""
    _softmax_gradient_kernel[(logits_LV.shape[0],)](
        logits_LV,
        logits_LV.stride(0),
        labels_L,
        coefficient_L,
        nll_L,
        logits_LV.shape[1],
        COLUMNS=4096,
        num_warps=8,
    )
