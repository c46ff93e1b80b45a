"""What a request adds to scores before a token is chosen: a bias by token, and penalties for tokens that were there.

The order is vLLM's: bias, repetition, frequency, presence; the temperature comes after them. Nothing here touches the
log probabilities that are reported. Shape legend: S scored positions, V vocabulary, N changed scores.
This module knows no cache and no rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from tenon.data.pack import upload
from tenon.infer.requests import Request


class Seen:
    """The tokens that a sequence's penalties count: those of its prompt, and how often its answer has each.

    Grows by one token at a time, so that a long sequence costs a pass no more than the copy of what it holds.
    """

    def __init__(self, request: Request) -> None:
        # Only repetition_penalty looks at the prompt.
        before = np.asarray(request.prompt_ids if request.repetition_penalty != 1.0 else (), dtype=np.int64)
        self._ids = np.unique(before)
        self._counts = np.zeros(len(self._ids), dtype=np.int64)
        self._used = len(self._ids)
        self._places = {int(token): place for place, token in enumerate(self._ids)}

    def add(self, token_id: int) -> None:
        """The answer has one more token."""
        place = self._places.setdefault(token_id, self._used)
        if place == len(self._ids):
            room = max(64, len(self._ids))
            self._ids = np.concatenate([self._ids, np.zeros(room, dtype=np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(room, dtype=np.int64)])
        if place == self._used:
            self._ids[place] = token_id
            self._used += 1
        self._counts[place] += 1

    @property
    def ids(self) -> np.ndarray:
        """(N) int64: every token once."""
        return self._ids[: self._used]

    @property
    def counts(self) -> np.ndarray:
        """(N) int64: how often the answer has it; 0 for those that only the prompt has."""
        return self._counts[: self._used]


def seen_by(request: Request, answer_ids: Iterable[int]) -> Seen | None:
    """What the request's penalties count after so much of an answer; None where it has none."""
    if not request.penalises:
        return None
    seen = Seen(request)
    for token_id in answer_ids:
        seen.add(token_id)
    return seen


def penalised(logits_SV: Tensor, asked: Sequence[tuple[Request, Seen | None] | None]) -> Tensor:
    """The scores to choose from: the same tensor where nobody asks for a change, else a changed copy.

    asked: for each position the request and what it counts; None where nothing is chosen.
    """
    steered = [(s, *one) for s, one in enumerate(asked) if one is not None and (one[0].penalises or one[0].logit_bias)]
    if not steered:
        return logits_SV
    changed_SV = logits_SV.clone()
    _add_bias(changed_SV, [(s, request) for s, request, _ in steered if request.logit_bias])
    _penalise(changed_SV, [(s, request, seen) for s, request, seen in steered if seen is not None and len(seen.ids)])
    return changed_SV


def _add_bias(logits_SV: Tensor, steered: Sequence[tuple[int, Request]]) -> None:
    """Add each request's bias, in place."""
    if not steered:
        return
    rows = np.repeat([s for s, _ in steered], [len(request.logit_bias) for _, request in steered])
    pairs = [pair for _, request in steered for pair in request.logit_bias]
    ids, values = np.array([token for token, _ in pairs]), np.array([value for _, value in pairs])
    rows_N, ids_N, bits_N = upload([rows, ids, values.view(np.int64)], logits_SV.device)
    logits_SV[rows_N, ids_N] += bits_N.view(torch.float64).to(logits_SV.dtype)


def _penalise(logits_SV: Tensor, steered: Sequence[tuple[int, Request, Seen]]) -> None:
    """Apply each request's penalties to the tokens that it counts, in place.

    Source: repetition: Keskar et al. 2019, section 4.1; frequency and presence: OpenAI's API reference.
    """
    if not steered:
        return
    lengths = [len(seen.ids) for _, _, seen in steered]
    rules = np.array([[r.repetition_penalty, r.frequency_penalty, r.presence_penalty] for _, r, _ in steered])
    rules_N3 = np.repeat(rules, lengths, axis=0)
    rows_N, ids_N, counts_N, *bits = upload(
        [
            np.repeat([s for s, _, _ in steered], lengths),
            np.concatenate([seen.ids for _, _, seen in steered]),
            np.concatenate([seen.counts for _, _, seen in steered]),
            *(np.ascontiguousarray(rules_N3[:, i]).view(np.int64) for i in range(3)),
        ],
        logits_SV.device,
    )
    repetition_N, frequency_N, presence_N = (each.view(torch.float64).to(logits_SV.dtype) for each in bits)
    scores_N = logits_SV[rows_N, ids_N]
    scores_N = torch.where(scores_N > 0, scores_N / repetition_N, scores_N * repetition_N)
    logits_SV[rows_N, ids_N] = scores_N - frequency_N * counts_N - presence_N * (counts_N > 0)
