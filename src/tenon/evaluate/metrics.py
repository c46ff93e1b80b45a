"""From examples to figures: each metric has a score for every row and a statistic of all rows, with its interval.

This module does not know how answers were made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tenon.evaluate.json_fields import field_accuracy, is_json
from tenon.evaluate.labels import NO_LABEL, label_indices, named_label
from tenon.evaluate.text import BleuScorer, exact, rouge_l
from tenon.runs.metric_table import metric_facts
from tenon.runs.results import Example, Metric
from tenon.stats import (
    Interval,
    bootstrap_interval,
    difference_interval,
    macro_f1_statistic,
    mean_difference_interval,
    mean_interval,
    perplexity_statistic,
    ratio_statistic,
)

if TYPE_CHECKING:
    from tenon.stats import Statistic

# Metrics whose figure is the mean of the rows' scores.
_MEANS = frozenset({"accuracy", "exact", "json_valid", "json_fields", "rouge_l"})


def row_scores(
    names: Sequence[str], expected: Sequence[str], got: Sequence[str], labels: Sequence[str]
) -> list[dict[str, float]]:
    """For each row the scores of the metrics that have one; exact match always."""
    bleu = BleuScorer.for_answers(expected) if "bleu" in names else None
    known = frozenset(labels)
    rows = []
    for wanted, answer in zip(expected, got, strict=True):
        scores = {"exact": exact(wanted, answer)}
        if "accuracy" in names or "macro_f1" in names:
            scores["accuracy"] = float(named_label(answer, known) == wanted.strip())
        if "json_valid" in names:
            scores["json_valid"] = float(is_json(answer))
        if "json_fields" in names:
            scores["json_fields"] = field_accuracy(wanted, answer)
        if "rouge_l" in names:
            scores["rouge_l"] = rouge_l(wanted, answer)
        if bleu is not None:
            scores["bleu"] = bleu.row(wanted, answer)
        rows.append(scores)
    return rows


def measure(name: str, examples: Sequence[Example], labels: Sequence[str], *, intervals: bool = True) -> Metric:
    """One metric over the examples that it can judge, with its 95% interval (intervals=False: the figure alone).

    Raises RecipeError recipe-metric-unknown; ValueError when no example can be judged.
    """
    facts = metric_facts(name)
    rows = judged(name, examples)
    interval = _interval(name, rows, labels) if intervals else _figure(name, rows, labels)
    return Metric(
        name=name,
        value=interval.value,
        low=interval.low,
        high=interval.high,
        unit=facts.unit,
        higher_is_better=facts.higher_is_better,
    )


def measure_difference(name: str, a: Sequence[Example], b: Sequence[Example], labels: Sequence[str]) -> Interval:
    """b minus a of one metric, over the same rows in the same order, in pairs."""
    rows_a, rows_b = judged(name, a), judged(name, b)
    if name in _MEANS:
        return mean_difference_interval([e.scores[name] for e in rows_a], [e.scores[name] for e in rows_b])
    return difference_interval(len(rows_a), _statistic(name, rows_a, labels), _statistic(name, rows_b, labels))


def judged(name: str, examples: Sequence[Example]) -> list[Example]:
    """The examples that a metric can judge: all with supervised tokens for loss, those with an answer for the rest."""
    if metric_facts(name).generates:
        return [e for e in examples if e.got is not None]
    return [e for e in examples if e.tokens > 0]


def _interval(name: str, rows: Sequence[Example], labels: Sequence[str]) -> Interval:
    if name in _MEANS:
        return mean_interval([e.scores[name] for e in rows])
    return bootstrap_interval(len(rows), _statistic(name, rows, labels))


def _figure(name: str, rows: Sequence[Example], labels: Sequence[str]) -> Interval:
    if name in _MEANS:
        value = sum(e.scores[name] for e in rows) / len(rows)
    else:
        value = float(_statistic(name, rows, labels)(np.ones((1, len(rows))))[0])
    return Interval(value, value, value)


def _statistic(name: str, rows: Sequence[Example], labels: Sequence[str]) -> Statistic:
    """The metric of resampled rows, for those that are no mean."""
    if name in ("loss", "perplexity"):
        make = ratio_statistic if name == "loss" else perplexity_statistic
        return make([e.scores["nll"] for e in rows], [e.tokens for e in rows])
    expected, got = [e.expected for e in rows], [e.got or "" for e in rows]
    if name == "bleu":
        return BleuScorer.for_answers(expected).statistic(expected, got)
    if name == "macro_f1":
        return macro_f1(expected, got, labels)
    raise KeyError(name)


def macro_f1(expected: Sequence[str], got: Sequence[str], labels: Sequence[str]) -> Statistic:
    """The mean F1 of the labels that are expected somewhere.

    A label that no row expects has no F1 of its own: an answer that names it is a miss of the expected label, like any
    other wrong answer.
    """
    gold, answers = label_indices([e.strip() for e in expected], got, [name for name in labels if name != NO_LABEL])
    present = set(gold)
    return macro_f1_statistic(gold, [j if j in present else -1 for j in answers], classes=len(labels))
