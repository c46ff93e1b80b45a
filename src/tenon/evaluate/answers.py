"""What subjects do with cases: the likelihood of the expected answer, and the answer that they give themselves.

All subjects run in the same passes over one resident base. An expected answer is checked and scored together with its
prompt, as a draft; tokens are generated one by one only from where a subject parts from it.
This module does not know metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tenon.data.pack import PackRow
from tenon.data.render import Renderer
from tenon.evaluate.cases import Case, answer_limit
from tenon.evaluate.text import without_reasoning
from tenon.evaluate.values import EvaluationOptions, OnProgress, SubjectSlot
from tenon.infer.generate import generate
from tenon.infer.requests import Completion, Request
from tenon.infer.score import score
from tenon.models.decoder import Bank, Decoder


@dataclass(frozen=True, slots=True)
class Answer:
    """What one subject did with one case. nll: in nats, over `tokens` supervised ones. got: None when nothing was to
    be generated.
    """

    nll: float
    tokens: int
    got: str | None


@dataclass(frozen=True, slots=True)
class Examiner:
    """The resident base with its adapters, and how it is asked."""

    decoder: Decoder
    bank: Bank | None
    renderer: Renderer
    options: EvaluationOptions

    def ask(
        self,
        subjects: Sequence[SubjectSlot],
        cases: Sequence[Case],
        *,
        generates: bool,
        on_progress: OnProgress | None = None,
    ) -> list[list[Answer]]:
        """For each subject its answer to each case. generates: whether answers are wanted or likelihoods alone."""
        asked = [i for i, case in enumerate(cases) if generates and case.prompt_ids]
        apart = [i for i, case in enumerate(cases) if not (generates and case.scored_by_answer)]
        progress = _Progress(on_progress, len(subjects) * (len(asked) + len(apart)))
        completions = self._complete(subjects, cases, asked, progress)
        likelihoods = self._likelihoods(subjects, cases, apart, progress)
        likelihoods |= {
            (s, i): _answer_likelihood(cases[i], completion)
            for (s, i), completion in completions.items()
            if cases[i].scored_by_answer
        }
        return [
            [Answer(*likelihoods[s, i], self._text(completions.get((s, i)))) for i in range(len(cases))]
            for s in range(len(subjects))
        ]

    def _complete(
        self, subjects: Sequence[SubjectSlot], cases: Sequence[Case], asked: Sequence[int], progress: _Progress
    ) -> dict[tuple[int, int], Completion]:
        """Greedy answers by (subject, case)."""
        pairs = [(s, i) for i in asked for s in range(len(subjects))]
        limit = answer_limit(cases, self.options.max_new_tokens)
        requests = [
            Request(
                cases[i].prompt_ids,
                slot=subjects[s].slot,
                max_new_tokens=limit,
                stop_ids=self.renderer.stop_ids,
                draft_ids=cases[i].answer_ids,
            )
            for s, i in pairs
        ]
        completions = generate(
            self.decoder,
            self.bank,
            requests,
            max_rows=self.options.max_rows,
            pass_tokens=self.options.pass_tokens,
            cache_bytes=self.options.cache_bytes,
            on_finish=progress.finished,
        )
        return dict(zip(pairs, completions, strict=True))

    def _likelihoods(
        self, subjects: Sequence[SubjectSlot], cases: Sequence[Case], scored: Sequence[int], progress: _Progress
    ) -> dict[tuple[int, int], tuple[float, int]]:
        """(nll, tokens) by (subject, case), in passes of their own."""
        pairs = [(s, i) for i in scored for s in range(len(subjects))]
        rows = [PackRow(subjects[s].slot, cases[i].ids, cases[i].supervised) for s, i in pairs]
        scores = score(self.decoder, self.bank, rows, pass_tokens=self.options.pass_tokens, on_rows=progress.add)
        return {pair: (row.nll, row.tokens) for pair, row in zip(pairs, scores, strict=True)}

    def _text(self, completion: Completion | None) -> str | None:
        return None if completion is None else without_reasoning(self.renderer.tokenizer.decode(completion.ids))


class _Progress:
    """Counts what is done of what there is to do."""

    def __init__(self, told: OnProgress | None, total: int) -> None:
        self._told, self._done, self._total = told, 0, total

    def add(self, count: int) -> None:
        self._done += count
        if self._told is not None:
            self._told(self._done, self._total)

    def finished(self, index: int, completion: Completion) -> None:
        """See `infer.requests.OnFinish`."""
        del index, completion
        self.add(1)


def _answer_likelihood(case: Case, completion: Completion) -> tuple[float, int]:
    """(nll, tokens) of the supervised tokens, from the log probabilities of the draft."""
    logprobs = np.array(completion.draft_logprobs, dtype=np.float64)
    chosen = logprobs[case.answer_supervised[: len(logprobs)]]
    return -float(chosen.sum()), len(chosen)
