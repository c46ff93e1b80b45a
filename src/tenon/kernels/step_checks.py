"""Checks of the fused kernels of a training step: each is run once and held against its plain form in float64.

Two slots of different rank with some tokens of none between them, sums over tokens in several chunks, sizes that fill
no block. Shape legend: T tokens, D inputs, F feed-forward, L labelled tokens, V vocabulary. This module does not know
who asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tenon.kernels import linear_cross_entropy_triton, low_rank
from tenon.kernels.attention_checks import largest_error, random_tensor
from tenon.kernels.blocks_triton import TILE
from tenon.kernels.copy_many import ScaledCopy, copy_many, copy_table
from tenon.kernels.low_rank import Addend, LoraGroup, LoraMember, LoraPart, LowRank, Routes, Sum
from tenon.kernels.low_rank_table import site_table
from tenon.kernels.rms_norm import add_norm, add_norm_backward
from tenon.kernels.rotary import Heads, HeadShape, Rotation, make_heads, make_heads_backward
from tenon.kernels.swiglu import swiglu, swiglu_backward

# (slot, first token, the one after the last); -1: of no slot.
_RUNS = ((0, 0, 70), (-1, 70, 75), (1, 75, 140))
_T, _CHUNK = 140, 64
_RANKS = (16, 8)
_D, _F, _V = 80, 144, 1_000
_HEADS, _KV_HEADS, _SIZE = 3, 1, 16
_QKV = (_HEADS * _SIZE, _KV_HEADS * _SIZE, _KV_HEADS * _SIZE)
_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class _Both:
    """The same slots twice: for fused kernels in their dtype, and for plain torch in float64; and activations."""

    fused: LowRank
    plain: LowRank
    low_TW: Tensor


def _slots(inputs: int, outs: Sequence[int], device: torch.device, dtype: torch.dtype) -> _Both:
    bounds = tuple(sum(outs[:i]) for i in range(len(outs) + 1))
    groups = [_group(rank, inputs, bounds, 10 * slot, device, dtype) for slot, rank in enumerate(_RANKS)]
    exact = [_exact(group) for group in groups]
    width = -(-max(len(group.a_RD) for group in groups) // 16) * 16
    table = site_table(groups, device)
    plain = LowRank(_parts(exact), bounds, width, max(_RANKS))
    fused = LowRank(_parts(groups), bounds, width, max(_RANKS), _routes(device), table)
    return _Both(fused, plain, random_tensor((_T, width), 99, dtype, device))


def _group(
    rank: int, inputs: int, bounds: Sequence[int], seed: int, device: torch.device, dtype: torch.dtype
) -> LoraGroup:
    members = []
    for i in range(len(bounds) - 1):
        b_OR = random_tensor((bounds[i + 1] - bounds[i], rank), seed + i, dtype, device) * 0.1
        grad = torch.zeros(b_OR.shape, device=device)
        members.append(LoraMember(b_OR, grad, bounds[i], bounds[i + 1], i * rank, (i + 1) * rank, 1.5, i))
    a_RD = random_tensor((len(members) * rank, inputs), seed + 5, dtype, device) * 0.1
    return LoraGroup(a_RD, torch.zeros(a_RD.shape, device=device), tuple(members))


def _exact(group: LoraGroup) -> LoraGroup:
    def member(m: LoraMember) -> LoraMember:
        return replace(m, b_OR=m.b_OR.double(), grad_b_OR=torch.zeros_like(m.b_OR, dtype=torch.float64))

    zeros = torch.zeros_like(group.a_RD, dtype=torch.float64)
    return replace(group, a_RD=group.a_RD.double(), grad_a_RD=zeros, members=tuple(map(member, group.members)))


def _parts(groups: Sequence[LoraGroup]) -> tuple[LoraPart, ...]:
    return tuple(LoraPart(groups[slot], start, stop) for slot, start, stop in _RUNS if slot >= 0)


def _routes(device: torch.device) -> Routes:
    tiles, chunks = _cut(TILE), _cut(_CHUNK)
    segments = []
    for slot, start, stop in _RUNS:
        inside = [i for i, (_, first, _) in enumerate(chunks) if start <= first < stop]
        segments += [(slot, inside[0], inside[-1] + 1)] if slot >= 0 else []
    lists = (torch.tensor(x, dtype=torch.int64).to(device) for x in (tiles, chunks, segments))
    return Routes(*lists, whole=False, draw_T=None)


def _cut(length: int) -> list[tuple[int, int, int]]:
    return [(slot, at, min(at + length, stop)) for slot, start, stop in _RUNS for at in range(start, stop, length)]


def _known(both: _Both, low_TW: Tensor) -> Tensor:
    """Low-rank activations with zeros where they are not defined."""
    known = torch.zeros_like(low_TW)
    for part in both.fused.parts:
        rows, ranks = slice(part.start, part.stop), slice(0, len(part.group.a_RD))
        known[rows, ranks] = low_TW[rows, ranks]
    return known


def _gradients(low: LowRank) -> list[Tensor]:
    found = []
    for part in low.parts:
        found += [part.group.grad_a_RD, *(m.grad_b_OR for m in part.group.members)]
    return [grad for grad in found if grad is not None and bool(grad.any())]


# ---- low-rank products ----------------------------------------------------------------------------------------------


def project_error(device: torch.device, *, dtype: torch.dtype = torch.bfloat16) -> float:
    """Of A x."""
    both, x_TD = _slots(_D, _QKV, device, dtype), random_tensor((_T, _D), 1, dtype, device)
    found, wanted = low_rank.project(x_TD, both.fused), low_rank.project(x_TD.double(), both.plain)
    assert found is not None and wanted is not None
    return largest_error([_known(both, found)], [_known(both, wanted)])


def project_back_error(device: torch.device, *, dtype: torch.dtype = torch.bfloat16) -> float:
    """Of s B^T dy."""
    both, dy_TO = _slots(_D, _QKV, device, dtype), random_tensor((_T, sum(_QKV)), 1, dtype, device)
    found = low_rank.project_back(dy_TO, both.fused)
    return largest_error([_known(both, found)], [_known(both, low_rank.project_back(dy_TO.double(), both.plain))])


def add_error(device: torch.device, *, dtype: torch.dtype = torch.bfloat16) -> float:
    """Of y + s B low, and of dx + A^T d_low."""
    both, found, wanted = _slots(_D, _QKV, device, dtype), [], []
    for columns, back in ((sum(_QKV), False), (_D, True)):
        y = random_tensor((_T, columns), 1, dtype, device)
        found.append(_sum(y.clone(), both, back=back).settled())
        wanted.append(_exact_sum(y, both, back=back).settled())
    return largest_error(found, wanted)


def gradient_error(device: torch.device, *, dtype: torch.dtype = torch.bfloat16) -> float:
    """Of the gradients of A and of every B, summed up in chunks."""
    both = _slots(_D, _QKV, device, dtype)
    x_TD, dy_TO = random_tensor((_T, _D), 1, dtype, device), random_tensor((_T, sum(_QKV)), 2, dtype, device)
    low_rank.add_gradient_a(x_TD, both.low_TW, both.fused)
    low_rank.add_gradient_b(dy_TO, both.low_TW, both.fused)
    low_rank.add_gradient_a(x_TD.double(), both.low_TW.double(), both.plain)
    low_rank.add_gradient_b(dy_TO.double(), both.low_TW.double(), both.plain)
    return largest_error(_gradients(both.fused), _gradients(both.plain))


def _sum(y: Tensor, both: _Both, *, back: bool) -> Sum:
    return Sum(y, Addend(both.low_TW, both.fused, back=back))


def _exact_sum(y: Tensor, both: _Both, *, back: bool) -> Sum:
    return Sum(y.double(), Addend(both.low_TW.double(), both.plain, back=back))


# ---- the rest of a layer --------------------------------------------------------------------------------------------


def add_norm_error(device: torch.device, *, dtype: torch.dtype = torch.bfloat16) -> float:
    """Of the sum before a norm, with its low-rank term, and of the norm."""
    both, (x, y) = _slots(_F, (_D,), device, dtype), _pair(_D, _D, device, dtype)
    gain_D = 1 + 0.1 * random_tensor((_D,), 3, dtype, device)
    found = add_norm(x, _sum(y.clone(), both, back=False), gain_D, _EPS, fuse=True)
    wanted = add_norm(x.double(), _exact_sum(y, both, back=False), gain_D.double(), _EPS, fuse=False)
    return largest_error(found, wanted)


def add_norm_backward_error(device: torch.device, *, dtype: torch.dtype = torch.bfloat16) -> float:
    """Of its gradient, with low-rank term and residual."""
    both, (x, dn) = _slots(_D, _QKV, device, dtype), _pair(_D, _D, device, dtype)
    passed, gain_D = random_tensor((_T, _D), 4, dtype, device), 1 + 0.1 * random_tensor((_D,), 3, dtype, device)
    found = add_norm_backward(_sum(dn.clone(), both, back=True), x, passed, gain_D, _EPS, fuse=True)
    exact_dn = _exact_sum(dn, both, back=True)
    wanted = add_norm_backward(exact_dn, x.double(), passed.double(), gain_D.double(), _EPS, fuse=False)
    return largest_error(found, wanted)


def heads_error(device: torch.device, *, dtype: torch.dtype = torch.bfloat16) -> float:
    """Of attention's heads: low-rank term, norms, rotation."""
    both, qkv = _slots(_D, _QKV, device, dtype), random_tensor((_T, sum(_QKV)), 1, dtype, device)
    shape, exact_shape, turn, exact_turn = _head_facts(device, dtype)
    found = make_heads(_sum(qkv.clone(), both, back=False), turn, shape, fuse=True)
    wanted = make_heads(_exact_sum(qkv, both, back=False), exact_turn, exact_shape, fuse=False)
    return largest_error(_of_heads(found), _of_heads(wanted))


def heads_backward_error(device: torch.device, *, dtype: torch.dtype = torch.bfloat16) -> float:
    """Of the projection's gradient."""
    qkv = random_tensor((_T, sum(_QKV)), 1, dtype, device)
    shape, exact_shape, turn, exact_turn = _head_facts(device, dtype)
    kept = make_heads(Sum(qkv.double(), None), exact_turn, exact_shape, fuse=False)
    dq, dk, dv = (random_tensor((_T, out // _SIZE, _SIZE), i, dtype, device) for i, out in enumerate(_QKV))
    found = make_heads_backward((dq, dk, dv), replace(kept, raw_TO=qkv), turn, shape, fuse=True)
    wanted = make_heads_backward((dq.double(), dk.double(), dv.double()), kept, exact_turn, exact_shape, fuse=False)
    return largest_error([found], [wanted])


def _head_facts(device: torch.device, dtype: torch.dtype) -> tuple[HeadShape, HeadShape, Rotation, Rotation]:
    gains = [1 + 0.1 * random_tensor((_SIZE,), seed, dtype, device) for seed in (5, 6)]
    angles = random_tensor((_T, _SIZE // 2), 7, torch.float32, device).repeat(1, 2)
    turn = Rotation(angles.cos().to(dtype), angles.sin().to(dtype))
    shape = HeadShape(_HEADS, _KV_HEADS, _SIZE, gains[0], gains[1], _EPS)
    exact = replace(shape, q_norm_E=gains[0].double(), k_norm_E=gains[1].double())
    return shape, exact, turn, Rotation(turn.cos_TE.double(), turn.sin_TE.double())


def _of_heads(heads: Heads) -> list[Tensor]:
    return [heads.q_THE, heads.k_TKE, heads.v_TKE]


def swiglu_error(device: torch.device, *, dtype: torch.dtype = torch.bfloat16) -> float:
    """Of silu(g) u, with the low-rank terms of g and u."""
    both, gate_up = _slots(_D, (_F, _F), device, dtype), random_tensor((_T, 2 * _F), 1, dtype, device)
    found = swiglu(_sum(gate_up.clone(), both, back=False), fuse=True)
    return largest_error([found], [swiglu(_exact_sum(gate_up, both, back=False), fuse=False)])


def swiglu_backward_error(device: torch.device, *, dtype: torch.dtype = torch.bfloat16) -> float:
    """Of its gradient and of the matrices' that meet h and the gradients of g and u."""
    ahead, down = _slots(_D, (_F, _F), device, dtype), _slots(_F, (_D,), device, dtype)
    gate_up, dh = _pair(2 * _F, _F, device, dtype)
    gates, tops = _sum(gate_up.clone(), ahead, back=False), _sum(dh.clone(), down, back=True)
    found = swiglu_backward(tops, gates, tops.addend, gates.addend, fuse=True)
    exact, exact_dh = _exact_sum(gate_up, ahead, back=False), _exact_sum(dh, down, back=True)
    wanted = swiglu_backward(exact_dh, exact, exact_dh.addend, exact.addend, fuse=False)
    gradients = [_gradients(ahead.fused) + _gradients(down.fused), _gradients(ahead.plain) + _gradients(down.plain)]
    return largest_error([found, *gradients[0]], [wanted, *gradients[1]])


def _pair(first: int, second: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return random_tensor((_T, first), 1, dtype, device), random_tensor((_T, second), 2, dtype, device)


def copies_error(device: torch.device, *, dtype: torch.dtype = torch.bfloat16) -> float:
    """Of many matrices copied at once, each times a factor."""
    shapes = ((_F, 16), (16, _D), (_D, 8))
    sources = [random_tensor(shape, seed, dtype, device) for seed, shape in enumerate(shapes)]
    found = [torch.zeros(rows, columns + 8, dtype=dtype, device=device)[:, :columns] for rows, columns in shapes]
    copy_many(copy_table([ScaledCopy(source, out, 1.5) for source, out in zip(sources, found, strict=True)]))
    return largest_error(found, [1.5 * source.double() for source in sources])


def softmax_gradient_error(device: torch.device, *, dtype: torch.dtype = torch.bfloat16) -> float:
    """Of the loss of each token and of the gradient of its logits."""
    rows = 5
    logits_LV = random_tensor((rows, _V), 1, dtype, device)
    labels_L = (torch.arange(rows) * (_V - 1) // (rows - 1)).to(device)
    weights_L, nll_L = torch.linspace(0.5, 1.0, rows, device=device), torch.empty(rows, device=device)
    log_p = logits_LV.double().log_softmax(-1)
    onehot = torch.nn.functional.one_hot(labels_L, _V)
    wanted = weights_L.double()[:, None] * (log_p.exp() - onehot)
    linear_cross_entropy_triton.softmax_gradient(logits_LV, labels_L, weights_L, nll_L)
    return largest_error([logits_LV, nll_L], [wanted, -log_p.gather(1, labels_L[:, None])[:, 0]])
