"""What a pass's scores say: chosen tokens, log probabilities, the likeliest tokens, and whether all is finite.

Shape legend: S scored positions, D hidden, V vocabulary. This module knows no cache and no rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tenon.batch import IGNORE, NO_SLOT
from tenon.data.pack import upload
from tenon.errors import AdapterError, BaseModelError, TenonError
from tenon.infer.guides import masked
from tenon.infer.penalties import penalised
from tenon.infer.sampling import Draw, sample, sample_rest
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


def score_positions(
    decoder: Decoder,
    hidden_SD: Tensor,
    draws: Sequence[Draw],
    labels: Sequence[int],
    *,
    masks: Mapping[int, np.ndarray],
) -> Scored:
    """draws: whose rules apply to each position. labels: the token that is known to follow there, or IGNORE. masks: the
    tokens that a grammar allows, by the position's number.

    Whatever a request does to the choice, log probabilities are the model's own. What is found comes back from the
    device in one piece, and again only for draws that the likeliest tokens do not settle.
    """
    rows = max(1, _SCORE_BYTES // (4 * decoder.facts.vocab))
    scored = Scored()
    for start in range(0, len(draws), rows):
        part = slice(start, start + rows)
        logits_SV = decoder.logits(hidden_SD[part]).float()
        asked = [(draw.request, draw.seen) if draw.drawn else None for draw in draws[part]]
        steered_SV = penalised(logits_SV, asked)
        guided = [s for s in range(len(asked)) if start + s in masks]
        if guided:
            steered_SV = masked(steered_SV, guided, np.stack([masks[start + s] for s in guided]))
        _score_part(logits_SV, steered_SV, draws[part], labels[part], scored)
    return scored


def _score_part(
    logits_SV: Tensor, steered_SV: Tensor, draws: Sequence[Draw], labels: Sequence[int], scored: Scored
) -> None:
    """Add what the scores of some positions say. steered: what is chosen from."""
    chosen = sample(steered_SV, draws)
    mass_S1 = logits_SV.logsumexp(dim=-1, keepdim=True)
    columns = [chosen.ids_S[:, None], chosen.settled_S[:, None], _logprobs(logits_SV, chosen.ids_S, mass_S1)]
    if any(label != IGNORE for label in labels):
        (labels_S,) = upload([np.array(labels).clip(min=0)], logits_SV.device)
        columns.append(_logprobs(logits_SV, labels_S, mass_S1))
    else:
        columns.append(columns[-1])
    most = min(max(draw.request.top_logprobs for draw in draws), logits_SV.shape[1])
    if most:
        top = logits_SV.topk(most)
        columns += [top.indices, top.values - mass_S1]
    # Ids, flags and fp32 numbers are exact in float64.
    found = torch.cat([column.double() for column in columns], dim=1).cpu().numpy()
    rest = np.flatnonzero(found[:, 1] == 0)
    if len(rest):
        ids_R = sample_rest(steered_SV, draws, rest.tolist())
        (rest_R,) = upload([rest], logits_SV.device)
        logprobs_R1 = _logprobs(logits_SV[rest_R], ids_R, mass_S1[rest_R])
        found[rest[:, None], [0, 2]] = torch.cat([ids_R[:, None].double(), logprobs_R1.double()], dim=1).cpu().numpy()
    scored.ids.extend(found[:, 0].astype(np.int64).tolist())
    scored.logprobs.extend(found[:, 2].tolist())
    scored.known_logprobs.extend(found[:, 3].tolist())
    scored.finite.extend(math.isfinite(own) and math.isfinite(known) for own, known in found[:, 2:4].tolist())
    ids, logprobs = found[:, 4 : 4 + most].astype(np.int64).tolist(), found[:, 4 + most :].tolist()
    for draw, row_ids, row_logprobs in zip(draws, ids, logprobs, strict=True):
        scored.tops.append(tuple(zip(row_ids, row_logprobs, strict=True))[: draw.request.top_logprobs])


def _logprobs(logits_SV: Tensor, ids_S: Tensor, mass_S1: Tensor) -> Tensor:
    """(S, 1): log probability of one token at each position. mass: of all tokens there, as a logarithm."""
    return logits_SV.gather(1, ids_S[:, None]) - mass_S1


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
