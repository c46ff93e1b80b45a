"""What a pass's scores say: chosen tokens, log probabilities, the likeliest tokens, and whether all is finite.

Shape legend: S scored positions, D hidden, V vocabulary. This module knows no cache and no rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tenon.batch import NO_SLOT
from tenon.errors import AdapterError, BaseModelError, TenonError
from tenon.infer.sampling import Draw, sample
from tenon.models.decoder import Decoder

# Bytes of fp32 scores that are held at once: large enough for full matrix speed.
_SCORE_BYTES = 128 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Scored:
    """What a pass found at its scored positions: the chosen tokens, their log probabilities, those of the known tokens
    (of the draft, or of the prompt), the likeliest tokens where they are wanted, and whether all that is finite.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    known_logprobs: list[float] = field(default_factory=list)
    tops: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    finite: list[bool] = field(default_factory=list)


def score_positions(decoder: Decoder, hidden_SD: Tensor, draws: list[Draw], labels: list[int]) -> Scored:
    """draws: whose rules apply to each position. labels: the token that is known to follow there, or IGNORE."""
    rows = max(1, _SCORE_BYTES // (4 * decoder.facts.vocab))
    scored = Scored()
    for start in range(0, len(draws), rows):
        part = slice(start, start + rows)
        logits_SV = decoder.logits(hidden_SD[part]).float()
        chosen_S = sample(logits_SV, draws[part])
        both_S2 = torch.stack([chosen_S, torch.tensor(labels[part], device=chosen_S.device).clamp(min=0)], dim=1)
        logprobs_S2 = logits_SV.gather(1, both_S2) - logits_SV.logsumexp(dim=-1, keepdim=True)
        scored.ids.extend(chosen_S.tolist())
        scored.logprobs.extend(logprobs_S2[:, 0].tolist())
        scored.known_logprobs.extend(logprobs_S2[:, 1].tolist())
        scored.tops.extend(_likeliest(logits_SV, draws[part]))
        scored.finite.extend(torch.isfinite(logprobs_S2).all(dim=1).tolist())
    return scored


def _likeliest(logits_SV: Tensor, draws: Sequence[Draw]) -> list[tuple[tuple[int, float], ...]]:
    """For each position the likeliest tokens with their log probabilities, as many as its request wants."""
    found: list[tuple[tuple[int, float], ...]] = [()] * len(draws)
    wanting = [s for s, draw in enumerate(draws) if draw.request.top_logprobs]
    if not wanting:
        return found
    scores_SV = logits_SV[torch.tensor(wanting, device=logits_SV.device)]
    most = min(max(draws[s].request.top_logprobs for s in wanting), scores_SV.shape[1])
    top = scores_SV.topk(most)
    logprobs_SK = (top.values - scores_SV.logsumexp(dim=-1, keepdim=True)).tolist()
    for s, ids, logprobs in zip(wanting, top.indices.tolist(), logprobs_SK, strict=True):
        found[s] = tuple(zip(ids, logprobs, strict=True))[: draws[s].request.top_logprobs]
    return found


def not_finite(slot: int) -> TenonError:
    """The error for scores that are NaN or infinite."""
    if slot == NO_SLOT:
        return BaseModelError(
            "base-not-finite",
            "the base gives scores that are not finite",
            hint="its files are damaged, or fp16 is too narrow for it; try precision: bf16 or fp32",
        )
    return AdapterError(
        "adapter-not-finite",
        f"the adapter in slot {slot} gives scores that are not finite",
        hint="its weights are damaged or too large; go back to an earlier version: tenon adapters list",
    )
