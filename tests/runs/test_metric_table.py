"""The table of metrics: names, nearest names, and what applies to which rows."""

from __future__ import annotations

import pytest

from tenon.errors import RecipeError
from tenon.runs.metric_table import DEFAULT_METRICS, METRICS, choose_metrics, metric_facts


def test_the_table_names_nine_metrics_and_defaults_are_among_them() -> None:
    assert len(METRICS) == 9
    assert all(task in METRICS[name].tasks for task, names in DEFAULT_METRICS.items() for name in names)


@pytest.mark.parametrize(
    ("name", "near"), [("rougeL", "rouge_l"), ("macro-f1", "macro_f1"), ("acuracy", "accuracy"), ("xyz", "perplexity")]
)
def test_an_unknown_metric_is_refused_with_the_nearest_names(name: str, near: str) -> None:
    with pytest.raises(RecipeError, match="recipe-metric-unknown") as caught:
        choose_metrics(("loss", name), "text")
    assert near in caught.value.hint


def test_a_metric_that_does_not_apply_is_refused() -> None:
    with pytest.raises(RecipeError, match="recipe-metric-inapplicable") as caught:
        choose_metrics(("accuracy",), "text")
    assert "rouge_l" in caught.value.hint
    assert "accuracy" not in caught.value.hint


def test_the_loss_is_always_measured() -> None:
    assert choose_metrics(("bleu",), "text") == ("bleu", "loss")
    assert choose_metrics(("loss",), "text") == ("loss",)
    assert choose_metrics((), "labels") == DEFAULT_METRICS["labels"]


def test_an_unknown_metric_names_the_key_that_asked_for_it() -> None:
    with pytest.raises(RecipeError, match=r"validation\.metric: there is no metric"):
        metric_facts("f2", key="validation.metric")
    assert metric_facts("loss").says == "loss"
