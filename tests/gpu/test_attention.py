"""Attention over packed rows against softmax in float64: grouped heads, windows, rows of one length and of any."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tenon.batch import PackedRows
from tenon.models import flash
from tests.gpu.kit import INTERPRETED, Draw, Judge

pytestmark = pytest.mark.skipif(INTERPRETED, reason="attention is torch's own")
# Query heads, key/value heads, their size.
HEADS = [(9, 3, 64), (32, 8, 128), (4, 4, 80), (4, 1, 256)]
ANY, EQUAL, SHORT = (1, 63, 64, 65, 300), (512, 512), (37, 37, 37)


def rows_of(lengths: tuple[int, ...], device: torch.device) -> PackedRows:
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    return PackedRows(bounds, max(lengths), len(set(lengths)) == 1)


def exact(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], *, scale: float, window: int) -> Tensor:
    """(T, H, E) in float64: each row's causal softmax; window > 0: over so many tokens, the query itself included."""
    out = []
    for q_LHE, k_LKE, v_LKE in zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True):
        repeats = q_LHE.shape[1] // k_LKE.shape[1]
        k_LHE, v_LHE = (x.repeat_interleave(repeats, dim=1) for x in (k_LKE, v_LKE))
        scores_HLL = torch.einsum("lhe,mhe->hlm", q_LHE, k_LHE) * scale
        place_L = torch.arange(len(q_LHE), device=q.device)
        before_LL = place_L[:, None] - place_L[None, :]
        hidden = (before_LL < 0) | ((before_LL >= window) if window else False)
        out.append(torch.einsum("hlm,mhe->lhe", scores_HLL.masked_fill(hidden, -torch.inf).softmax(-1), v_LHE))
    return torch.cat(out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [0, 1, 50])
@pytest.mark.parametrize("lengths", [ANY, EQUAL, SHORT, (1,)], ids=str)
@pytest.mark.parametrize(("heads", "kv", "size"), HEADS)
def test_forward_and_gradients(
    heads: int,
    kv: int,
    size: int,
    lengths: tuple[int, ...],
    window: int,
    dtype: torch.dtype,
    device: torch.device,
    judge: Judge,
) -> None:
    if not flash.fits(device, dtype, size):
        pytest.skip("no such kernel here")
    draw, tokens, scale = Draw(heads, dtype, device), sum(lengths), size**-0.5
    q, k, v = draw(tokens, heads, size), draw(tokens, kv, size), draw(tokens, kv, size)
    out, tape = flash.attend(q, k, v, rows_of(lengths, device), scale=scale, window=window, record=True)
    assert tape is not None
    dense = isinstance(tape, flash.DenseTape)
    assert dense == (lengths == EQUAL and size <= 128 and window == 0)
    d_out = draw(tokens, heads, size)
    grads = tape.backward(d_out)
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    wanted = exact(inputs[0], inputs[1], inputs[2], lengths, scale=scale, window=window)
    name = "attention, cuDNN" if dense else "attention, flash"
    # The probabilities are rounded before they are multiplied, and on the way back their gradients.
    judge(name, out, wanted.detach(), roundings=4)
    for side, found, right in zip("qkv", grads, torch.autograd.grad(wanted, inputs, d_out.double()), strict=True):
        if window == 1 or lengths == (1,):
            # A token that sees itself alone has one probability, 1: queries and keys get no gradient but rounding.
            assert side == "v" or float(found.double().norm()) <= 0.05 * float(d_out.double().norm())
        if side == "v" or (window != 1 and lengths != (1,)):
            judge(f"{name}, d{side}", found, right, roundings=12)


def test_inference_keeps_no_tape(device: torch.device, judge: Judge) -> None:
    if not flash.fits(device, torch.bfloat16, 64):
        pytest.skip("no such kernel here")
    draw = Draw(0, torch.bfloat16, device)
    q, k, v = draw(1024, 8, 64), draw(1024, 2, 64), draw(1024, 2, 64)
    out, tape = flash.attend(q, k, v, rows_of(EQUAL, device), scale=0.125, window=0, record=False)
    assert tape is None
    judge("attention, flash", out, exact(q.double(), k.double(), v.double(), EQUAL, scale=0.125, window=0), roundings=4)
