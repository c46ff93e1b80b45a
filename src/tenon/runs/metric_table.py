"""The metrics that Tenon knows: their names, units, directions, and the kinds of rows that they make sense for.

Light on purpose: a misspelt metric in a recipe is refused before anything is loaded. This module does not know how a
metric is computed (evaluate.metrics).
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from tenon.errors import RecipeError

# What rows are: labelled; with answers that are all JSON; with other answers; text without a prompt.
Task = Literal["labels", "json", "text", "likelihood"]
_ANSWERED: tuple[Task, ...] = ("labels", "json", "text")


@dataclass(frozen=True, slots=True)
class MetricFacts:
    """One metric. says: its name in a sentence. tasks: where it makes sense. generates: whether it needs answers.

    unit: `share` (0 to 1), `nats/token`, or empty for a figure of its own scale.
    """

    name: str
    says: str
    unit: str
    higher_is_better: bool
    tasks: tuple[Task, ...]
    generates: bool = True


METRICS: dict[str, MetricFacts] = {
    facts.name: facts
    for facts in (
        MetricFacts("accuracy", "accuracy", "share", True, ("labels",)),
        MetricFacts("macro_f1", "macro-F1", "share", True, ("labels",)),
        MetricFacts("exact", "exact match", "share", True, _ANSWERED),
        MetricFacts("json_valid", "JSON validity", "share", True, ("json",)),
        MetricFacts("json_fields", "JSON field accuracy", "share", True, ("json",)),
        MetricFacts("rouge_l", "ROUGE-L", "share", True, ("json", "text")),
        MetricFacts("bleu", "BLEU", "", True, ("json", "text")),
        MetricFacts("loss", "loss", "nats/token", False, (*_ANSWERED, "likelihood"), generates=False),
        MetricFacts("perplexity", "perplexity", "", False, (*_ANSWERED, "likelihood"), generates=False),
    )
}

# What is measured when nothing was asked for; the first one decides.
DEFAULT_METRICS: dict[Task, tuple[str, ...]] = {
    "labels": ("accuracy", "macro_f1", "loss", "perplexity"),
    "json": ("exact", "json_valid", "json_fields", "loss", "perplexity"),
    "text": ("exact", "rouge_l", "bleu", "loss", "perplexity"),
    "likelihood": ("loss", "perplexity"),
}


def metric_facts(name: str, *, key: str = "") -> MetricFacts:
    """The metric of that name. key: where it was asked for. Raises RecipeError recipe-metric-unknown with the nearest
    names.
    """
    found = METRICS.get(name)
    if found is not None:
        return found
    plain = name.lower().replace("-", "_").replace(" ", "_")
    near = difflib.get_close_matches(plain, METRICS, n=2, cutoff=0.5)
    raise RecipeError(
        "recipe-metric-unknown",
        f"{key}: there is no metric of that name" if key else "there is no metric of that name",
        got=name,
        hint=f"did you mean {' or '.join(near)}?" if near else f"the metrics are {', '.join(METRICS)}",
    )


def fit_any_rows(names: Sequence[str]) -> bool:
    """Whether the metrics make sense whatever the rows are."""
    return all(set(get_args(Task)) <= set(metric_facts(name).tasks) for name in names)


def choose_metrics(asked: Sequence[str], task: Task, *, key: str = "") -> tuple[str, ...]:
    """The metrics to measure on rows of a task: those asked for, and the loss always; the usual ones when none is.

    key: where they were asked for. Raises RecipeError recipe-metric-unknown, recipe-metric-inapplicable.
    """
    for name in asked:
        if task not in metric_facts(name).tasks:
            raise RecipeError(
                "recipe-metric-inapplicable",
                (f"{key}: " if key else "") + f"{name} does not apply to these rows: {_WHAT_ROWS_ARE[task]}",
                got=name,
                hint=f"choose from {', '.join(m.name for m in METRICS.values() if task in m.tasks)}"
                + (f", or leave {key} out" if key else ""),
            )
    return tuple(dict.fromkeys((*asked, "loss"))) if asked else DEFAULT_METRICS[task]


_WHAT_ROWS_ARE: dict[Task, str] = {
    "labels": "each has a label",
    "json": "their answers are JSON",
    "text": "their answers are text, not labels and not all JSON",
    "likelihood": "they are plain text without a prompt",
}
