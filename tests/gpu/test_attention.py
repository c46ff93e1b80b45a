"""Attention over packed rows against softmax in float64: grouped heads, windows, rows of one length and of any."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tenon.batch import PackedRows
from tenon.kernels import attention_cudnn
from tenon.models import flash
from tenon.models.flash import CudnnTape, FlashTape, RowAttention
from tests.gpu.kit import INTERPRETED, Draw, Judge

pytestmark = pytest.mark.skipif(INTERPRETED, reason="attention is torch's own")
# Query heads, key/value heads, their size.
HEADS = [(9, 3, 64), (32, 8, 128), (4, 4, 80), (4, 1, 256)]
ANY, EQUAL, SHORT, EMPTY = (1, 63, 64, 65, 300), (512, 512), (37, 37, 37), (0, 150, 0, 77, 0)
ROOM = 4_000_000_000


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
@pytest.mark.parametrize("lengths", [ANY, EQUAL, SHORT, EMPTY, (1,)], ids=str)
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
    # Side by side, as the stacked projection makes them.
    q, k, v = draw(tokens, heads + 2 * kv, size).split([heads, kv, kv], dim=1)
    d_out, rows = draw(tokens, heads, size), rows_of(lengths, device)
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    wanted = exact(inputs[0], inputs[1], inputs[2], lengths, scale=scale, window=window)
    right = torch.autograd.grad(wanted, inputs, d_out.double())
    out, tape = RowAttention(rows, ROOM).attend(q, k, v, scale=scale, window=window, record=True)
    for name, (found, grads) in {
        "attention, cuDNN" if isinstance(tape, CudnnTape) else "attention": (out, backward_of(tape, d_out)),
        "attention, flash": by_flash(q, k, v, rows, d_out, scale=scale, window=window),
    }.items():
        # The probabilities are rounded before they are multiplied, and on the way back their gradients.
        judge(name, found, wanted.detach(), roundings=4)
        for side, gradient, exact_gradient in zip("qkv", grads, right, strict=True):
            if window == 1 or lengths == (1,):
                # A token that sees itself alone has one probability, 1: queries and keys get no gradient but rounding.
                assert side == "v" or float(gradient.double().norm()) <= 0.05 * float(d_out.double().norm())
            if side == "v" or (window != 1 and lengths != (1,)):
                judge(f"{name}, d{side}", gradient, exact_gradient, roundings=12)


@pytest.mark.parametrize("lengths", [(1000, 2048, 37, 700, 1500, 129), (2048, 2048), (600,) * 9], ids=str)
@pytest.mark.parametrize(("heads", "kv", "size"), [(32, 8, 128), (9, 3, 64)])
def test_the_same_bits_every_time_however_much_room(
    heads: int, kv: int, size: int, lengths: tuple[int, ...], device: torch.device
) -> None:
    if not flash.fits(device, torch.bfloat16, size):
        pytest.skip("no such kernel here")
    draw, tokens, rows = Draw(heads, torch.bfloat16, device), sum(lengths), rows_of(lengths, device)
    q, k, v = draw(tokens, heads + 2 * kv, size).split([heads, kv, kv], dim=1)
    d_out, found = draw(tokens, heads, size), []
    for room_bytes in (ROOM, ROOM, 0, 0):
        out, tape = RowAttention(rows, room_bytes).attend(q, k, v, scale=size**-0.5, window=0, record=True)
        found.append((out, *backward_of(tape, d_out)))
    by_kernel = [found[:2], found[2:]] if kinds_differ(q, k, v, rows) else [found]
    for same in by_kernel:
        assert all(torch.equal(x, y) for other in same for x, y in zip(same[0], other, strict=True))
    one, two = (by_flash(q, k, v, rows, d_out, scale=size**-0.5, window=0)[1] for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


def test_on_hopper_rows_of_any_length_go_to_cudnn_or_it_is_said_why_not(device: torch.device) -> None:
    if torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("older than Hopper")
    q, k, v = Draw(0, torch.bfloat16, device)(sum(ANY), 48, 128).split([32, 8, 8], dim=1)
    attention = RowAttention(rows_of(ANY, device), ROOM)
    tape = attention.attend(q, k, v, scale=0.1, window=0, record=True)[1]
    usable = attention_cudnn.frontend() is not None
    assert isinstance(tape, CudnnTape) == usable == (attention.problem == "") == (not attention_cudnn.missing(device))
    # A longest row that no sums have room for is nothing that anybody could install.
    attention = RowAttention(rows_of((16_384,), device), 0)
    q, k, v = Draw(0, torch.bfloat16, device)(16_384, 48, 128).split([32, 8, 8], dim=1)
    tape = attention.attend(q, k, v, scale=0.1, window=0, record=True)[1]
    assert isinstance(tape, FlashTape) and (attention.problem == "") == usable


def backward_of(tape: CudnnTape | FlashTape | None, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    assert tape is not None
    return tape.backward(d_out)


def by_flash(
    q: Tensor, k: Tensor, v: Tensor, rows: PackedRows, d_out: Tensor, *, scale: float, window: int
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    tape = FlashTape(q, k, v, rows, scale=scale, window=window)
    return tape.out_THE, tape.backward(d_out)


def kinds_differ(q: Tensor, k: Tensor, v: Tensor, rows: PackedRows) -> bool:
    """Whether so little room that cuDNN has none for one head leaves a batch to flash attention."""
    attends = (RowAttention(rows, room).attend(q, k, v, scale=1.0, window=0, record=True) for room in (ROOM, 0))
    one, other = (type(tape) for _, tape in attends)
    return one is not other


def test_inference_keeps_no_tape(device: torch.device, judge: Judge) -> None:
    if not flash.fits(device, torch.bfloat16, 64):
        pytest.skip("no such kernel here")
    draw = Draw(0, torch.bfloat16, device)
    q, k, v = draw(1024, 8, 64), draw(1024, 2, 64), draw(1024, 2, 64)
    out, tape = RowAttention(rows_of(EQUAL, device), ROOM).attend(q, k, v, scale=0.125, window=0, record=False)
    assert tape is None
    judge("attention, flash", out, exact(q.double(), k.double(), v.double(), EQUAL, scale=0.125, window=0), roundings=4)
