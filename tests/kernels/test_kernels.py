"""Every kernel against its plain reference: forward and each gradient, float64, awkward sizes, empty, frozen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tenon.kernels.dropout import dropout, keep_mask
from tenon.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from tenon.kernels.lora_linear import LoraGroup, LoraMember, LoraPart, lora_linear, lora_linear_reference
from tenon.kernels.rms_norm import rms_norm, rms_norm_reference
from tenon.kernels.rotary import rotary, rotary_reference
from tenon.kernels.swiglu import swiglu, swiglu_reference

DOUBLE = torch.float64


def leaf(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    return values.to(dtype).requires_grad_()


@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (0, 8), (5, 3, 16)])
def test_rms_norm_and_its_gradient(shape: tuple[int, ...]) -> None:
    x, other, w = leaf(*shape), leaf(*shape), leaf(shape[-1], seed=1).detach()
    y, reference = rms_norm(x, w, 1e-5), rms_norm_reference(other, w, 1e-5)
    dy = torch.randn_like(y)
    y.backward(dy)
    reference.backward(dy)
    torch.testing.assert_close(y, reference)
    torch.testing.assert_close(x.grad, other.grad)


def test_rms_norm_in_bf16_is_as_close_as_its_reference() -> None:
    x, w = leaf(64, 128), leaf(128, seed=1).detach()
    exact = rms_norm_reference(x, w, 1e-5)
    fast = rms_norm(x.to(torch.bfloat16), w.to(torch.bfloat16), 1e-5)
    assert (fast.double() - exact).norm() / exact.norm() < 6e-3


@pytest.mark.parametrize("shape", [(1, 2), (9, 26), (0, 4)])
def test_swiglu_and_its_gradient(shape: tuple[int, int]) -> None:
    x, other = leaf(*shape), leaf(*shape)
    y, reference = swiglu(x), swiglu_reference(other)
    dy = torch.randn_like(y)
    y.backward(dy)
    reference.backward(dy)
    torch.testing.assert_close(y, reference)
    torch.testing.assert_close(x.grad, other.grad)


@pytest.mark.parametrize(("tokens", "heads", "size"), [(1, 1, 2), (5, 3, 8), (0, 2, 4)])
def test_rotary_and_its_gradient(tokens: int, heads: int, size: int) -> None:
    x, other = leaf(tokens, heads, size), leaf(tokens, heads, size)
    angles = torch.randn(tokens, size // 2, dtype=DOUBLE).repeat(1, 2)
    cos, sin = angles.cos() * 1.3, angles.sin() * 1.3
    y, reference = rotary(x, cos, sin), rotary_reference(other, cos, sin)
    dy = torch.randn_like(y)
    y.backward(dy)
    reference.backward(dy)
    torch.testing.assert_close(y, reference)
    torch.testing.assert_close(x.grad, other.grad)


def make_parts(sizes: list[int], inputs: int, outs: tuple[int, ...], *, drop: float, trained: bool) -> list[LoraPart]:
    """One part per slot: slot i has rank i + 2 at each module, and the second module is left out of slot 1."""
    parts, start = [], 0
    for slot, size in enumerate(sizes):
        rank, members, rank_at, out_at = slot + 2, [], 0, 0
        for i, out in enumerate(outs):
            if not (slot == 1 and i == 1):
                b = leaf(out, rank, seed=10 * slot + i)
                grad = torch.zeros(out, rank, dtype=DOUBLE) if trained else None
                members.append(LoraMember(b, grad, out_at, out_at + out, rank_at, rank_at + rank, 0.5 + slot))
                rank_at += rank
            out_at += out
        a = leaf(rank_at, inputs, seed=100 + slot)
        group = LoraGroup(a, torch.zeros_like(a) if trained else None, tuple(members), drop, 7 + slot)
        keys = torch.arange(start, start + size, dtype=torch.int32) * 977 if drop else None
        parts.append(LoraPart(group, start, start + size, keys))
        start += size
    return parts


@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_lora_linear_gradients_of_every_slot(drop: float, bias: bool) -> None:
    """A token of no slot is at the end; slots have different ranks, scales and targets."""
    inputs, outs, sizes = 11, (6, 3, 5), [4, 1, 7]
    w, b = leaf(sum(outs), inputs, seed=1).detach(), leaf(sum(outs), seed=2).detach() if bias else None
    parts = tuple(make_parts(sizes, inputs, outs, drop=drop, trained=True))
    x, other, anchor = leaf(sum(sizes) + 2, inputs), leaf(sum(sizes) + 2, inputs), torch.zeros((), requires_grad=True)
    reference = lora_linear_reference(other, w, b, parts)
    dy = torch.randn_like(reference)
    reference.backward(dy)
    with torch.no_grad():
        detached = tuple(
            LoraPart(
                LoraGroup(
                    p.group.a_RD.detach(),
                    p.group.grad_a_RD,
                    tuple(
                        LoraMember(
                            m.b_OR.detach(), m.grad_b_OR, m.out_start, m.out_stop, m.rank_start, m.rank_stop, m.scale
                        )
                        for m in p.group.members
                    ),
                    p.group.dropout,
                    p.group.salt,
                ),
                p.start,
                p.stop,
                p.draw_T,
            )
            for p in parts
        )
    y = lora_linear(x, w, b, detached, anchor)
    y.backward(dy)
    torch.testing.assert_close(y, reference)
    torch.testing.assert_close(x.grad, other.grad)
    for fast, plain in zip(detached, parts, strict=True):
        torch.testing.assert_close(fast.group.grad_a_RD, plain.group.a_RD.grad)
        for m, n in zip(fast.group.members, plain.group.members, strict=True):
            torch.testing.assert_close(m.grad_b_OR, n.b_OR.grad)
    assert anchor.grad is None


def test_lora_linear_adds_up_over_micro_batches_and_leaves_frozen_slots_alone() -> None:
    inputs, outs = 5, (4,)
    w = leaf(4, inputs, seed=1).detach()
    (part,) = make_parts([6], inputs, outs, drop=0.0, trained=True)
    (frozen,) = make_parts([6], inputs, outs, drop=0.0, trained=False)
    x, anchor = leaf(6, inputs).detach(), torch.zeros((), requires_grad=True)
    for piece in (x[:2], x[2:]):
        cut = LoraPart(part.group, 0, len(piece))
        lora_linear(piece, w, None, (cut,), anchor).sum().backward()
    whole = make_parts([6], inputs, outs, drop=0.0, trained=True)[0]
    lora_linear(x, w, None, (whole,), anchor).sum().backward()
    assert whole.group.grad_a_RD is not None and bool(whole.group.grad_a_RD.abs().sum() > 0)
    torch.testing.assert_close(part.group.grad_a_RD, whole.group.grad_a_RD)
    lora_linear(x, w, None, (frozen,), anchor).sum().backward()
    torch.testing.assert_close(
        lora_linear(x, w, None, (frozen,), None), lora_linear_reference(x, w, None, (frozen,)).detach()
    )


@pytest.mark.parametrize(("rows", "vocab"), [(1, 5), (300, 31), (1000, 3)])
def test_linear_cross_entropy_and_its_gradient(rows: int, vocab: int) -> None:
    h, other, w = leaf(rows, 9), leaf(rows, 9), leaf(vocab, 9, seed=1).detach()
    labels = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(3))
    c = torch.rand(rows, dtype=DOUBLE)
    loss, nll = linear_cross_entropy(h, w, labels, c)
    reference = linear_cross_entropy_reference(other, w, labels, c)
    (2 * loss).backward()
    (2 * reference).backward()
    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close((nll * c).sum(), reference)
    torch.testing.assert_close(h.grad, other.grad)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(h, w, labels, c)[1], nll)


def test_no_labelled_token_gives_zero_not_nan() -> None:
    h = leaf(0, 9)
    loss, nll = linear_cross_entropy(h, leaf(5, 9).detach(), torch.zeros(0, dtype=torch.int64), torch.zeros(0).double())
    loss.backward()
    assert loss.item() == 0.0 and nll.shape == (0,)


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
