"""Judges subjects (the base, adapters) on the same rows: answers, scores, figures with intervals.

This module does not know files or registries, and not how answers are made (evaluate.answers).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from tenon.data.render import Renderer
from tenon.evaluate.answers import Answer, Examiner
from tenon.evaluate.cases import Case, Rows, find_task, take_cases
from tenon.evaluate.labels import confusion
from tenon.evaluate.metrics import judged, measure, row_scores
from tenon.evaluate.values import EvaluationOptions, OnProgress, SubjectSlot
from tenon.models.decoder import Bank, Decoder
from tenon.runs.metric_table import METRICS, Task, choose_metrics
from tenon.runs.results import Example, Result


def evaluate(
    decoder: Decoder,
    bank: Bank | None,
    subject: SubjectSlot,
    rows: Rows,
    renderer: Renderer,
    *,
    base_hash: str,
    options: EvaluationOptions,
    on_progress: OnProgress | None = None,
) -> Result:
    """`evaluate_many` of one subject."""
    return evaluate_many(
        decoder, bank, [subject], rows, renderer, base_hash=base_hash, options=options, on_progress=on_progress
    )[0]


def evaluate_many(
    decoder: Decoder,
    bank: Bank | None,
    subjects: Sequence[SubjectSlot],
    rows: Rows,
    renderer: Renderer,
    *,
    base_hash: str,
    options: EvaluationOptions,
    on_progress: OnProgress | None = None,
) -> list[Result]:
    """One result a subject, in order, all on the same rows, in shared passes.

    A result's seconds are the subject's share of the time. Raises RecipeError recipe-metric-unknown,
    recipe-metric-inapplicable; DataError data-evaluation-empty.
    """
    started = time.monotonic()
    cases, data_hash = take_cases(rows, renderer, most=options.rows)
    task = find_task(cases)
    names = choose_metrics(options.metrics, task)
    examiner = Examiner(decoder, bank, renderer, options)
    generates = any(METRICS[name].generates for name in names)
    answers = examiner.ask(subjects, cases, generates=generates, on_progress=on_progress)
    labels = _labels(cases, task, options)
    seconds = (time.monotonic() - started) / len(subjects)
    results = []
    for subject, mine in zip(subjects, answers, strict=True):
        examples = _examples(cases, mine, names, labels)
        shown, counts = _confusion(examples, labels)
        figures = [measure(n, examples, labels, intervals=options.intervals) for n in names if judged(n, examples)]
        results.append(
            Result(
                subject=subject.label,
                base_hash=base_hash,
                adapter_hash=subject.adapter_hash,
                data_hash=data_hash,
                template_hash=renderer.template_hash,
                task=task,
                metrics=tuple(figures),
                examples=tuple(examples),
                labels=shown,
                confusion=counts,
                seconds=seconds,
            )
        )
    return results


def _labels(cases: Sequence[Case], task: Task, options: EvaluationOptions) -> tuple[str, ...]:
    if task != "labels":
        return ()
    own = {case.label for case in cases if case.label is not None}
    return tuple(sorted(own | {label.strip() for label in options.labels}))


def _examples(
    cases: Sequence[Case], answers: Sequence[Answer], names: Sequence[str], labels: Sequence[str]
) -> list[Example]:
    given = [(case.expected, answer.got) for case, answer in zip(cases, answers, strict=True) if answer.got is not None]
    scores = iter(row_scores(names, [expected for expected, _ in given], [got for _, got in given], labels))
    return [
        Example(
            row=case.row,
            source=case.source,
            prompt=case.prompt,
            expected=case.expected,
            got=answer.got,
            tokens=answer.tokens,
            scores={"nll": answer.nll} | (next(scores) if answer.got is not None else {}),
        )
        for case, answer in zip(cases, answers, strict=True)
    ]


def _confusion(
    examples: Sequence[Example], labels: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """(names, counts) of labelled rows that were answered; see `labels.confusion`."""
    answered = [e for e in examples if e.got is not None]
    if not labels or not answered:
        return labels, ()
    return confusion([e.expected for e in answered], [e.got or "" for e in answered], labels)
