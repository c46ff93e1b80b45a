"""Every kernel's plain form against its reference: forward and each gradient, float64, awkward sizes, empty, frozen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tenon.kernels.dropout import dropout, keep_mask
from tenon.kernels.linear_cross_entropy import linear_cross_entropy_reference, loss_and_gradient, token_nll
from tenon.kernels.low_rank import (
    Addend,
    LoraGroup,
    LoraMember,
    LoraPart,
    LowRank,
    Sum,
    add_gradient_a,
    add_gradient_b,
    lora_linear_reference,
    project,
    project_back,
)
from tenon.kernels.rms_norm import add_norm, add_norm_backward, rms_norm, rms_norm_backward, rms_norm_reference
from tenon.kernels.rotary import Heads, HeadShape, Rotation, make_heads, make_heads_backward, rotary, rotary_reference
from tenon.kernels.swiglu import swiglu, swiglu_backward, swiglu_reference

DOUBLE = torch.float64


def leaf(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    return values.to(dtype).requires_grad_()


@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (0, 8), (5, 3, 16)])
def test_rms_norm_and_its_gradient(shape: tuple[int, ...]) -> None:
    x, w = leaf(*shape), leaf(shape[-1], seed=1).detach()
    reference = rms_norm_reference(x, w, 1e-5)
    dy = torch.randn_like(reference)
    reference.backward(dy)
    torch.testing.assert_close(rms_norm(x.detach(), w, 1e-5), reference)
    torch.testing.assert_close(rms_norm_backward(dy, x.detach(), w, 1e-5), x.grad)


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_the_sum_before_a_norm_and_both_gradients(tokens: int) -> None:
    """The residual passes the norm by; the norm is made again on the way back."""
    x, y, w = leaf(tokens, 12), leaf(tokens, 12, seed=1), leaf(12, seed=2).detach()
    stream = x + y
    normed = rms_norm_reference(stream, w, 1e-5)
    d_stream, d_normed = torch.randn_like(stream), torch.randn_like(normed)
    torch.autograd.backward([stream, normed], [d_stream, d_normed])
    out, n = add_norm(x.detach(), Sum(y.detach().clone(), None), w, 1e-5, fuse=False)
    torch.testing.assert_close((out, n), (stream.detach(), normed.detach()))
    dx, again = add_norm_backward(Sum(d_normed.clone(), None), out, d_stream, w, 1e-5, fuse=False)
    torch.testing.assert_close(dx, x.grad)
    torch.testing.assert_close(again, n)


def test_rms_norm_in_bf16_is_as_close_as_its_reference() -> None:
    x, w = leaf(64, 128).detach(), leaf(128, seed=1).detach()
    exact = rms_norm_reference(x, w, 1e-5)
    fast = rms_norm(x.to(torch.bfloat16), w.to(torch.bfloat16), 1e-5)
    assert (fast.double() - exact).norm() / exact.norm() < 6e-3


@pytest.mark.parametrize("shape", [(1, 2), (9, 26), (0, 4)])
def test_swiglu_and_its_gradient(shape: tuple[int, int]) -> None:
    x = leaf(*shape)
    reference = swiglu_reference(x)
    dy = torch.randn_like(reference)
    reference.backward(dy)
    torch.testing.assert_close(swiglu(Sum(x.detach(), None), fuse=False), reference)
    d_gate_up = swiglu_backward(Sum(dy.clone(), None), Sum(x.detach().clone(), None), None, None, fuse=False)
    torch.testing.assert_close(d_gate_up, x.grad)


@pytest.mark.parametrize(("tokens", "heads", "size"), [(1, 1, 2), (5, 3, 8), (0, 2, 4)])
def test_rotary_and_its_gradient(tokens: int, heads: int, size: int) -> None:
    x = leaf(tokens, heads, size)
    angles = torch.randn(tokens, size // 2, dtype=DOUBLE).repeat(1, 2)
    turn = Rotation(angles.cos() * 1.3, angles.sin() * 1.3)
    reference = rotary_reference(x, turn.cos_TE, turn.sin_TE)
    dy = torch.randn_like(reference)
    reference.backward(dy)
    torch.testing.assert_close(rotary(x.detach(), turn), reference)
    torch.testing.assert_close(rotary(dy, turn, back=True), x.grad)


@pytest.mark.parametrize("turns", [True, False])
@pytest.mark.parametrize("norms", [True, False])
def test_heads_and_the_gradient_of_their_projection(norms: bool, turns: bool) -> None:
    tokens, heads, kv, size = 6, 4, 2, 8
    gains = (leaf(size, seed=1).detach(), leaf(size, seed=2).detach()) if norms else (None, None)
    shape = HeadShape(heads, kv, size, *gains, 1e-6)
    x = leaf(tokens, (heads + 2 * kv) * size)
    angles = torch.randn(tokens, size // 2, dtype=DOUBLE).repeat(1, 2)
    turn = Rotation(angles.cos(), angles.sin()) if turns else None
    q, k, v = x.view(tokens, -1, size).split([heads, kv, kv], dim=1)
    if gains[0] is not None and gains[1] is not None:
        q, k = rms_norm_reference(q, gains[0], 1e-6), rms_norm_reference(k, gains[1], 1e-6)
    if turn is not None:
        q, k = (rotary_reference(y, turn.cos_TE, turn.sin_TE) for y in (q, k))
    grads = [torch.randn_like(y) for y in (q, k, v)]
    torch.autograd.backward([q, k, v], grads)
    made = make_heads(Sum(x.detach().clone(), None), turn, shape, fuse=False)
    torch.testing.assert_close((made.q_THE, made.k_TKE, made.v_TKE), (q.detach(), k.detach(), v.detach()))
    kept = Heads(made.q_THE, made.k_TKE, made.v_TKE, x.detach() if norms else None)
    torch.testing.assert_close(
        make_heads_backward((grads[0], grads[1], grads[2]), kept, turn, shape, fuse=False), x.grad
    )


def make_parts(sizes: list[int], inputs: int, outs: tuple[int, ...], *, drop: float, trained: bool) -> list[LoraPart]:
    """One part per slot: slot i has rank i + 2 at each module, and the second module is left out of slot 1."""
    parts, start = [], 0
    for slot, size in enumerate(sizes):
        rank, members, rank_at, out_at = slot + 2, [], 0, 0
        for i, out in enumerate(outs):
            if not (slot == 1 and i == 1):
                b = leaf(out, rank, seed=10 * slot + i)
                grad = torch.zeros(out, rank, dtype=DOUBLE) if trained else None
                members.append(LoraMember(b, grad, out_at, out_at + out, rank_at, rank_at + rank, 0.5 + slot, i))
                rank_at += rank
            out_at += out
        a = leaf(rank_at, inputs, seed=100 + slot)
        group = LoraGroup(a, torch.zeros_like(a) if trained else None, tuple(members), drop, 7 + slot)
        keys = torch.arange(start, start + size, dtype=torch.int32) * 977 if drop else None
        parts.append(LoraPart(group, start, start + size, keys))
        start += size
    return parts


def low_rank_of(parts: list[LoraPart], outs: tuple[int, ...]) -> LowRank:
    bounds = tuple(sum(outs[:i]) for i in range(len(outs) + 1))
    width = max(part.group.a_RD.shape[0] for part in parts)
    return LowRank(tuple(parts), bounds, width, max(m.b_OR.shape[1] for p in parts for m in p.group.members))


@torch.no_grad()
def step(x: Tensor, w: Tensor, b: Tensor | None, dy: Tensor, low: LowRank) -> tuple[Tensor, Tensor]:
    """(y, dx) of the whole layer, as the decoder puts it together; gradients go into the buffers."""
    low_TW = project(x, low)
    assert low_TW is not None
    y = Sum(torch.nn.functional.linear(x, w, b), Addend(low_TW, low, back=False)).settled()
    d_low_TW = project_back(dy, low)
    add_gradient_b(dy, low_TW, low)
    add_gradient_a(x, d_low_TW, low)
    return y, Sum(dy @ w, Addend(d_low_TW, low, back=True)).settled()


@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_low_rank_gradients_of_every_slot(drop: float, bias: bool) -> None:
    """Tokens of no slot are at the end; slots have different ranks, scales and targets."""
    inputs, outs, sizes = 11, (6, 3, 5), [4, 1, 7]
    w, b = leaf(sum(outs), inputs, seed=1).detach(), leaf(sum(outs), seed=2).detach() if bias else None
    parts = make_parts(sizes, inputs, outs, drop=drop, trained=True)
    x = leaf(sum(sizes) + 2, inputs)
    reference = lora_linear_reference(x, w, b, tuple(parts))
    dy = torch.randn_like(reference)
    reference.backward(dy)
    y, dx = step(x.detach(), w, b, dy, low_rank_of(parts, outs))
    torch.testing.assert_close(y, reference)
    torch.testing.assert_close(dx, x.grad)
    for part in parts:
        torch.testing.assert_close(part.group.grad_a_RD, part.group.a_RD.grad)
        for m in part.group.members:
            torch.testing.assert_close(m.grad_b_OR, m.b_OR.grad)


def test_low_rank_gradients_add_up_over_micro_batches_and_leave_frozen_slots_alone() -> None:
    inputs, outs = 5, (4,)
    w, x, dy = leaf(4, inputs, seed=1).detach(), leaf(6, inputs).detach(), leaf(6, 4, seed=3).detach()
    (part,) = make_parts([6], inputs, outs, drop=0.0, trained=True)
    (frozen,) = make_parts([6], inputs, outs, drop=0.0, trained=False)
    (whole,) = make_parts([6], inputs, outs, drop=0.0, trained=True)
    for rows in (slice(0, 2), slice(2, 6)):
        cut = LoraPart(part.group, 0, rows.stop - rows.start)
        step(x[rows], w, None, dy[rows], low_rank_of([cut], outs))
    y, _ = step(x, w, None, dy, low_rank_of([whole], outs))
    assert whole.group.grad_a_RD is not None and bool(whole.group.grad_a_RD.abs().sum() > 0)
    torch.testing.assert_close(part.group.grad_a_RD, whole.group.grad_a_RD)
    torch.testing.assert_close(part.group.members[0].grad_b_OR, whole.group.members[0].grad_b_OR)
    frozen_y, _ = step(x, w, None, dy, low_rank_of([frozen], outs))
    torch.testing.assert_close(frozen_y, y)
    assert frozen.group.grad_a_RD is None


@pytest.mark.parametrize(("rows", "vocab"), [(1, 5), (300, 31), (1000, 3)])
def test_linear_cross_entropy_and_its_gradient(rows: int, vocab: int) -> None:
    h, w = leaf(rows, 9), leaf(vocab, 9, seed=1).detach()
    labels = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(3))
    c = torch.rand(rows, dtype=DOUBLE)
    reference = linear_cross_entropy_reference(h, w, labels, c)
    reference.backward()
    nll, dh = loss_and_gradient(h.detach(), w, labels, c, fuse=False)
    torch.testing.assert_close((nll * c).sum(), reference)
    torch.testing.assert_close(dh, h.grad)
    torch.testing.assert_close(token_nll(h.detach(), w, labels), nll)


def test_no_labelled_token_gives_zero_not_nan() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    nll, dh = loss_and_gradient(leaf(0, 9).detach(), leaf(5, 9).detach(), none, torch.zeros(0).double(), fuse=False)
    assert nll.shape == (0,) and dh.shape == (0, 9) and nll.sum().item() == 0.0


def test_dropout_depends_on_key_salt_and_feature_alone() -> None:
    keys = torch.arange(500, dtype=torch.int32) * 31
    mask = keep_mask(keys, 3, 200, 0.25)
    assert mask.shape == (500, 200)
    assert abs(mask.double().mean().item() - 0.75) < 0.006
    torch.testing.assert_close(mask[100:150], keep_mask(keys[100:150], 3, 200, 0.25))
    assert (mask != keep_mask(keys, 4, 200, 0.25)).double().mean() > 0.3
    rows, columns = mask.double().mean(1), mask.double().mean(0)
    assert rows.std() < 0.045 and columns.std() < 0.03
    x = torch.ones(500, 200, dtype=DOUBLE)
    torch.testing.assert_close(dropout(x, keys, 3, 0.25), mask.double() / 0.75)
