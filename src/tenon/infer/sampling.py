"""The next token from its scores: greedy, or drawn from what temperature, top-k, top-p and min-p leave.

A draw is a race: every token has a waiting time of its own, exponential with its probability as the rate, and the first
to come is drawn (the Gumbel-max trick; Maddison, Tarlow, Minka 2014). The times are made by counter from the request's
seed, the position and the token's id, so the same request gives the same tokens alone, in any batch, and after a
restart. A walk along the probabilities with one number would not: scores differ in their last bits with a batch's
shape, and every edge of the walk moves with the sum of all that lies before it. In a race two tokens change places only
when they come at nearly the same time. Nothing is sorted but for top-k and top-p, which need the likeliest tokens in
order: a few are looked at first, and more only for a row whose limits they do not settle.

Shape legend: S scored positions, R of them that are drawn, V vocabulary, C candidates, N tokens of either. This module
knows no cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tenon.data.pack import upload
from tenon.infer.guides import Guide
from tenon.infer.penalties import Seen
from tenon.infer.requests import Request

_MASK64 = (1 << 64) - 1
# So many of the likeliest tokens are looked at, one number after the other, until they settle a draw: what is quick to
# find (a CPU's topk is slow beyond 128), and what leaves little to be sorted.
_CANDIDATES = {"cpu": (128, 4096), "cuda": (1024, 16_384)}
# Temperatures below are greedy: fp32 divides by no less.
_LEAST_TEMPERATURE = 1e-30
# More tokens than any vocabulary has.
_MOST_TOP_K = 1 << 31
# Tokens whose numbers, 8 bytes each, lie in a core's second cache.
_CACHED_TOKENS = 1 << 17
# SplitMix64: what its states are apart, and its finaliser's two factors.
_GAMMA, _FACTORS = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


@dataclass(frozen=True, slots=True)
class Draw:
    """Whose rules apply to one scored position, and its place in the sequence (the prompt's first token is 0).

    drawn: False where the token is known already and only scored: nothing is drawn then. seen: what the request's
    penalties count there. guide: how far its grammar has come.
    """

    request: Request
    position: int
    drawn: bool = True
    seen: Seen | None = None
    guide: Guide | None = None


@dataclass(frozen=True, slots=True)
class Chosen:
    """ids_S (int64): one token for each position. settled_S (bool): where it is certain; `sample_rest` does the rest.

    Both stay on the device: to look at them is to wait for it.
    """

    ids_S: Tensor
    settled_S: Tensor


@dataclass(frozen=True, slots=True)
class _Rules:
    """Columns (R, 1) of the drawn rows: limits, and where each row's stream of numbers begins. top_k: 0 is all."""

    temperature_R1: Tensor
    top_p_R1: Tensor
    top_k_R1: Tensor
    min_p_R1: Tensor
    stream_R1: Tensor


def sample(logits_SV: Tensor, draws: Sequence[Draw]) -> Chosen:
    """One token for each position, without waiting for the device."""
    ids_S = logits_SV.argmax(dim=-1)  # torch takes the first of equal ones: the lowest id
    settled_S = torch.ones_like(ids_S, dtype=torch.bool)
    drawn = [s for s, draw in enumerate(draws) if draw.drawn and draw.request.temperature > 0.0]
    limited = [s for s in drawn if _has_limits(draws[s].request, logits_SV.shape[1])]
    free = sorted(set(drawn).difference(limited))
    if free:
        rows_R, rules = _rules(free, draws, logits_SV.device)
        ids_S[rows_R] = _draw_freely(logits_SV[rows_R], rules)
    if limited:
        rows_R, rules = _rules(limited, draws, logits_SV.device)
        ids_S[rows_R], settled_S[rows_R] = _draw(logits_SV[rows_R], rules, _candidates(logits_SV)[0])
    return Chosen(ids_S, settled_S)


def _has_limits(request: Request, vocabulary: int) -> bool:
    return request.top_p < 1.0 or request.min_p > 0.0 or 0 < request.top_k < vocabulary


def sample_rest(logits_SV: Tensor, draws: Sequence[Draw], rest: Sequence[int]) -> Tensor:
    """(R) ids of the positions `rest`, which `sample` left unsettled: from more of the vocabulary, or all of it."""
    found_R = torch.zeros(len(rest), dtype=torch.int64, device=logits_SV.device)
    left = list(range(len(rest)))
    for candidates in _candidates(logits_SV)[1:]:
        rows_R, rules = _rules([rest[r] for r in left], draws, logits_SV.device)
        ids_R, settled_R = _draw(logits_SV[rows_R], rules, candidates)
        (left_R,) = upload([np.array(left)], logits_SV.device)
        found_R[left_R] = ids_R
        left = [r for r, settled in zip(left, settled_R.tolist(), strict=True) if not settled]
        if not left or candidates == logits_SV.shape[1]:
            break
    return found_R


def _candidates(logits_SV: Tensor) -> list[int]:
    """How many of the likeliest tokens are looked at, at first and then; at last all."""
    steps = _CANDIDATES.get(logits_SV.device.type, _CANDIDATES["cuda"])
    return [*(count for count in steps if count < logits_SV.shape[1]), logits_SV.shape[1]]


def _rules(rows: Sequence[int], draws: Sequence[Draw], device: torch.device) -> tuple[Tensor, _Rules]:
    """The rows' indices and their rules, by one copy to the device."""
    requests = [draws[s].request for s in rows]
    floats = (
        [request.temperature for request in requests],
        [request.top_p for request in requests],
        [request.min_p for request in requests],
    )
    # A client may ask for more than an int64 holds.
    top_k = [min(request.top_k, _MOST_TOP_K) for request in requests]
    streams = [_signed(_stream(draws[s].request.seed, draws[s].position)) for s in rows]
    whole = [np.array(column, dtype=np.int64) for column in (rows, top_k, streams)]
    bits = [np.array(column, dtype=np.float64).view(np.int64) for column in floats]
    rows_R, top_k_R, stream_R, *rest = upload([*whole, *bits], device)
    temperature, top_p, min_p = (each.view(torch.float64)[:, None] for each in rest)
    return rows_R, _Rules(temperature, top_p, top_k_R[:, None], min_p, stream_R[:, None])


def _draw_freely(logits_RV: Tensor, rules: _Rules) -> Tensor:
    """ids_R from the whole vocabulary: no limits, so nothing is sorted."""
    weights_RV = _weights(logits_RV, logits_RV.amax(dim=1, keepdim=True), rules)
    ids_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    # A CPU goes over few rows at a time, so that what is between lies in its cache.
    rows = max(_CACHED_TOKENS // len(ids_V), 1) if logits_RV.device.type == "cpu" else len(logits_RV)
    pieces = zip(weights_RV.split(rows), rules.stream_R1.split(rows), strict=True)
    return torch.cat([weights.div_(waiting_times(stream, ids_V)).argmax(dim=1) for weights, stream in pieces])


def waiting_times(stream_R1: Tensor, ids_N: Tensor) -> Tensor:
    """(R, N) in fp32: exponential with rate 1, a function of a row's stream and a token's id alone.

    stream_R1: int64. ids: int64, (N) or (R, N). Source: SplitMix64 (Steele, Lea, Flood 2014); its states are `stream`
    and so many steps of it as the id says.
    """
    z_RN = stream_R1 + (ids_N + 1) * _signed(_GAMMA)
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        z_RN ^= (z_RN >> shift).bitwise_and_((1 << (64 - shift)) - 1)  # as if it had no sign
        z_RN *= _signed(factor)
    z_RN ^= (z_RN >> 31).bitwise_and_((1 << 33) - 1)
    uniform_RN = (z_RN >> 11).bitwise_and_((1 << 53) - 1).float().add_(0.5).mul_(2.0**-53)  # never 0
    return uniform_RN.neg_().log1p_().neg_()


def _weights(logits_RV: Tensor, highest_R1: Tensor, rules: _Rules) -> Tensor:
    """(R, V) in fp32: what is proportional to each token's probability, and at most 1."""
    return (logits_RV - highest_R1).div_(rules.temperature_R1.clamp(min=_LEAST_TEMPERATURE).float()).exp_()


def _draw(logits_RV: Tensor, rules: _Rules, candidates: int) -> tuple[Tensor, Tensor]:
    """(ids_R, settled_R) from the likeliest so many tokens, added up in float64 as the tail of a vocabulary needs it.

    Order: temperature, top-k, top-p (over what top-k left), min-p. The likeliest token always stays.
    """
    vocabulary = logits_RV.shape[1]
    ids_RC, logits_RC, certain_R1 = _likeliest(logits_RV, candidates)
    highest_R1 = logits_RC[:, :1]
    weights_RC = ((logits_RC.double() - highest_R1.double()) / rules.temperature_R1).exp()  # at most 1: no overflow
    top_k_R1 = torch.where((rules.top_k_R1 > 0) & (rules.top_k_R1 < vocabulary), rules.top_k_R1, vocabulary)
    at_C = torch.arange(candidates, device=ids_RC.device)
    inside_RC = at_C < torch.minimum(top_k_R1, certain_R1)
    all_R1 = _weights(logits_RV, highest_R1, rules).sum(dim=1, keepdim=True, dtype=torch.float64)
    some_R1 = (weights_RC * inside_RC).sum(dim=1, keepdim=True)
    # What top-k leaves is among the candidates, or all that a grammar does: the last of them is impossible.
    limited_R1 = (top_k_R1 <= certain_R1) | (logits_RC[:, -1:] == float("-inf"))
    probabilities_RC = weights_RC / torch.where(limited_R1, some_R1, all_R1)
    before_RC = probabilities_RC.cumsum(dim=1) - probabilities_RC
    kept_RC = inside_RC & (before_RC < rules.top_p_R1) & (probabilities_RC >= rules.min_p_R1 * probabilities_RC[:, :1])
    kept_RC[:, 0] = True
    # Closed: the last token that the limits leave is among the candidates.
    count_R1 = kept_RC.sum(dim=1, keepdim=True)
    closed_R1 = limited_R1 | ((top_k_R1 == vocabulary) & (count_R1 < certain_R1))
    arrivals_RC = (weights_RC / waiting_times(rules.stream_R1, ids_RC)).masked_fill_(~kept_RC, -1.0)
    index_R1 = arrivals_RC.argmax(dim=1, keepdim=True)
    return ids_RC.gather(1, index_R1)[:, 0], (closed_R1 & (certain_R1 > 0))[:, 0]


def _likeliest(logits_RV: Tensor, candidates: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids_RC, logits_RC, certain_R1): the likeliest tokens in order, of equal ones the lowest ids first.

    certain: so many of them are the right ones. (topk does not promise which of equal ones it takes, so those that
    equal its last are not.)
    """
    vocabulary = logits_RV.shape[1]
    if candidates == vocabulary:
        logits_RC, ids_RC = logits_RV.sort(dim=1, descending=True, stable=True)
        return ids_RC, logits_RC, torch.full_like(ids_RC[:, :1], vocabulary)
    ids_RC = logits_RV.topk(candidates, dim=1).indices.sort(dim=1).values
    logits_RC, order_RC = logits_RV.gather(1, ids_RC).sort(dim=1, descending=True, stable=True)
    certain_R1 = (logits_RC > logits_RC[:, -1:]).sum(dim=1, keepdim=True)
    return ids_RC.gather(1, order_RC), logits_RC, certain_R1


def _stream(seed: int, position: int) -> int:
    """Where a request's numbers for one position begin: 64 bits, a function of (seed, position) alone."""
    return _mix64(_mix64(seed & _MASK64) + position + 1)


def _mix64(value: int) -> int:
    """A step of SplitMix64 and its finaliser."""
    value = (value + _GAMMA) & _MASK64
    value = ((value ^ (value >> 30)) * _FACTORS[0]) & _MASK64
    value = ((value ^ (value >> 27)) * _FACTORS[1]) & _MASK64
    return value ^ (value >> 31)


def _signed(bits: int) -> int:
    """The int64 of the same bits."""
    return bits - (1 << 64) if bits >> 63 else bits
