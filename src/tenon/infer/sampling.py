"""The next token from its scores: greedy, or drawn from what temperature, top-k, top-p and min-p leave.

A draw uses one uniform number, made by counter from the request's (seed, position): the same request gives the same
tokens alone, in any batch, and after a restart.

Shape legend: S scored positions, V vocabulary. This module knows no cache and no rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tenon.infer.requests import Request

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Draw:
    """Whose rules apply to one scored position, and its place in the sequence (the prompt's first token is 0).

    drawn: False where the token is known already and only scored: nothing is drawn then.
    """

    request: Request
    position: int
    drawn: bool = True


def sample(logits_SV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """(S) int64 token ids, one for each position."""
    chosen_S = logits_SV.argmax(dim=-1)  # torch takes the first of equal ones: the lowest id
    drawn = [i for i, draw in enumerate(draws) if draw.drawn and draw.request.temperature > 0.0]
    for i in drawn:
        chosen_S[i] = _sample_one(logits_SV[i], draws[i])
    return chosen_S


def _sample_one(logits_V: Tensor, draw: Draw) -> int:
    ids_V, probabilities_V = kept_tokens(logits_V, draw.request)
    edges_V = probabilities_V.cumsum(0)
    point = uniform(draw.request.seed, draw.position) * float(edges_V[-1])
    index = int(
        torch.searchsorted(edges_V, torch.tensor(point, dtype=edges_V.dtype, device=edges_V.device), right=True)
    )
    return int(ids_V[min(index, len(ids_V) - 1)])


def kept_tokens(logits_V: Tensor, request: Request) -> tuple[Tensor, Tensor]:
    """Ids and float64 probabilities of the tokens that the request's limits leave, likeliest first, summing to 1.

    Order: temperature, top-k, top-p (over what top-k left), min-p. The likeliest token always stays.
    """
    scores_V = (logits_V.double() - logits_V.max()) / request.temperature  # from 0 down: no overflow when it is tiny
    if 0 < request.top_k < len(scores_V):
        scores_V, ids_V = _top(scores_V, request.top_k)
    else:
        scores_V, ids_V = scores_V.sort(descending=True, stable=True)
    probabilities_V = scores_V.softmax(dim=0)
    keep_V = probabilities_V.cumsum(0) - probabilities_V < request.top_p
    keep_V &= probabilities_V >= request.min_p * probabilities_V[0]
    keep_V[0] = True
    kept_V = probabilities_V[keep_V]
    return ids_V[keep_V], kept_V / kept_V.sum()


def _top(scores_V: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest scores with their ids, of equal ones the lowest ids (topk alone does not promise which)."""
    threshold = scores_V.topk(count).values[-1]
    ids_C = torch.nonzero(scores_V >= threshold).squeeze(-1)
    ordered_C = scores_V[ids_C].sort(descending=True, stable=True)
    return ordered_C.values[:count], ids_C[ordered_C.indices[:count]]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, a function of (seed, position) alone.

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood 2014), applied to the seed and then to the position.
    """
    return (_mix64(_mix64(seed & _MASK64) + position + 1) >> 11) * 2.0**-53


def _mix64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
