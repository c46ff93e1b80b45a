"""Checks of attention, torch's back ends and cuDNN's: each is run forward and backward and held against the formula in
float64.

Shape legend: G rows, T tokens of all rows, H query heads, K key/value heads, L tokens of a row, E head dimension. This
module does not know who asks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from tenon.kernels import attention_cudnn

_HEADS = 4
_HEAD_SIZE = 64
_ROWS, _LENGTH = 2, 128
# Awkward on purpose: one token, odd, a whole block, one more than a block.
_ROW_LENGTHS = (1, 37, 64, 65)


def attention_reference(q_HLE: Tensor, k_KLE: Tensor, v_KLE: Tensor) -> Tensor:
    """Causal softmax(q k^T / sqrt(E)) v of one row, (H, L, E), in the dtype of its inputs; K divides H."""
    repeats = q_HLE.shape[0] // k_KLE.shape[0]
    k_HLE, v_HLE = k_KLE.repeat_interleave(repeats, dim=0), v_KLE.repeat_interleave(repeats, dim=0)
    scores_HLL = q_HLE @ k_HLE.transpose(1, 2) / q_HLE.shape[-1] ** 0.5
    future_LL = torch.ones(scores_HLL.shape[1:], dtype=torch.bool, device=scores_HLL.device).triu(1)
    return scores_HLL.masked_fill(future_LL, float("-inf")).softmax(-1) @ v_HLE


def sdpa_error(device: torch.device, *, backend: SDPBackend, dtype: torch.dtype, kv_heads: int = _HEADS) -> float:
    """The largest relative error of output and gradients of scaled_dot_product_attention with this back end alone."""
    inputs = [random_tensor((_ROWS, heads, _LENGTH, _HEAD_SIZE), i, dtype, device) for i, heads in _heads(kv_heads)]
    q, k, v = (x.requires_grad_() for x in inputs)
    with sdpa_kernel(backend):
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=kv_heads != _HEADS)
        dout = random_tensor(out.shape, 3, dtype, device)
        grads = torch.autograd.grad(out, (q, k, v), dout)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted = torch.stack([attention_reference(*(x[row] for x in exact)) for row in range(_ROWS)])
    return largest_error([out, *grads], [wanted, *torch.autograd.grad(wanted, exact, dout.double())])


def varlen_error(device: torch.device, *, dtype: torch.dtype, kv_heads: int = _HEADS) -> float:
    """The same of `varlen_attn` over a stream of rows of different lengths, which never see each other."""
    from torch.nn.attention.varlen import varlen_attn

    tokens, longest = sum(_ROW_LENGTHS), max(_ROW_LENGTHS)
    inputs = [random_tensor((tokens, heads, _HEAD_SIZE), i, dtype, device) for i, heads in _heads(kv_heads)]
    q, k, v = (x.requires_grad_() for x in inputs)
    bounds = _bounds(device)
    if kv_heads == _HEADS:
        out = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0))
    else:
        out = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0), enable_gqa=True)
    assert isinstance(out, Tensor)
    dout = random_tensor(out.shape, 3, dtype, device)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted = rows_reference(exact)
    return largest_error([out, *grads], [wanted, *torch.autograd.grad(wanted, exact, dout.double())])


def cudnn_rows_error(device: torch.device, *, dtype: torch.dtype, kv_heads: int) -> float:
    """The same of `attention_cudnn`; infinite when a second backward pass gives other bits than the first."""
    # Side by side, as a step's projection makes them.
    whole = random_tensor((sum(_ROW_LENGTHS), _HEADS + 2 * kv_heads, _HEAD_SIZE), 0, dtype, device)
    q, k, v = whole.split([_HEADS, kv_heads, kv_heads], dim=1)
    shape = attention_cudnn.shape_of(q, k, len(_ROW_LENGTHS), max(_ROW_LENGTHS), scale=_HEAD_SIZE**-0.5, window=0)
    offsets = attention_cudnn.offsets_of(_bounds(device), shape)
    out, stats = attention_cudnn.forward(q, k, v, shape, offsets)
    dout = random_tensor(out.shape, 3, dtype, device)
    grads, again = (
        attention_cudnn.backward(dout, (q, k, v), out, stats, shape, offsets, groups=kv_heads) for _ in range(2)
    )
    if not all(torch.equal(one, other) for one, other in zip(grads, again, strict=True)):
        return math.inf
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    wanted = rows_reference(exact)
    return largest_error([out, *grads], [wanted, *torch.autograd.grad(wanted, exact, dout.double())])


def _bounds(device: torch.device) -> Tensor:
    """Where the rows begin and end, int32."""
    return torch.tensor([0, *_ROW_LENGTHS], device=device).cumsum(0).to(torch.int32)


def rows_reference(exact: Sequence[Tensor]) -> Tensor:
    """The stream (T, H, E), each row attended alone."""
    rows = zip(*(x.split(_ROW_LENGTHS) for x in exact), strict=True)
    return torch.cat([attention_reference(*(x.transpose(0, 1) for x in row)).transpose(0, 1) for row in rows])


def _heads(kv_heads: int) -> list[tuple[int, int]]:
    """(seed, heads) of q, k and v."""
    return list(enumerate((_HEADS, kv_heads, kv_heads)))


def random_tensor(shape: Sequence[int], seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal values, the same on every device."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def largest_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest of |found - wanted| / |wanted|, Frobenius norms; infinite when anything is not finite."""
    errors = [
        float((f.detach().double() - w.detach()).norm() / w.detach().norm()) for f, w in zip(found, wanted, strict=True)
    ]
    return max(error if math.isfinite(error) else math.inf for error in errors)
