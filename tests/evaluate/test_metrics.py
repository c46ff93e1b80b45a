"""Figures against their sources: scikit-style definitions by hand, rouge-score and sacrebleu themselves."""

from __future__ import annotations

import json
import math
import random

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from tenon.evaluate.json_fields import field_accuracy, is_json
from tenon.evaluate.labels import NO_LABEL, confusion, named_label
from tenon.evaluate.metrics import measure, measure_difference, row_scores
from tenon.evaluate.text import BleuScorer, exact, rouge_l, without_reasoning
from tenon.runs.metric_table import METRICS, metric_facts
from tenon.runs.results import Example

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "under",
    "mat",
    "rug",
    "and",
    "then",
    "it",
    "was",
    "not",
    "there",
    ",",
    ".",
]


def _examples(
    names: tuple[str, ...], expected: list[str], got: list[str], labels: tuple[str, ...] = ()
) -> list[Example]:
    scores = row_scores(names, expected, got, labels)
    return [
        Example(row=i, source=f"f:{i}", prompt="", expected=e, got=g, tokens=2 + i % 3, scores={"nll": 0.5 + i, **s})
        for i, (e, g, s) in enumerate(zip(expected, got, scores, strict=True))
    ]


def _sentences(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 14))) for _ in range(count)]


def test_exact_forgives_spaces_at_the_ends_and_nothing_else() -> None:
    assert exact("on lamp", " on lamp\n") == 1.0
    assert [exact("on lamp", got) for got in ("On lamp", "on  lamp", "on lamp.", "")] == [0.0] * 4


def test_reasoning_is_no_part_of_an_answer() -> None:
    assert without_reasoning("<think>\nlong\n</think>\n\n42") == "42"
    assert without_reasoning("no thought\n") == "no thought\n"


def test_accuracy_and_macro_f1_by_hand() -> None:
    labels = ("a", "b", "c", "z")
    expected, got = ["a", "a", "a", "b", "b", "c"], ["a", "a", "b", "b", "nonsense", "z"]
    examples = _examples(("accuracy", "macro_f1"), expected, got, labels)
    assert [e.scores["accuracy"] for e in examples] == [1, 1, 0, 1, 0, 0]
    assert measure("accuracy", examples, labels).value == 0.5
    # a: precision 1, recall 2/3; b: 1/2 and 1/2; c: 0. z is expected nowhere and has no F1 of its own.
    f1 = measure("macro_f1", examples, labels)
    assert f1.value == pytest.approx((0.8 + 0.5 + 0.0) / 3)
    assert f1.low < f1.value < f1.high
    names, counts = confusion(expected, got, labels)
    assert names == ("a", "b", "c", "z", NO_LABEL)
    assert counts == ((2, 1, 0, 0, 0), (0, 1, 0, 0, 1), (0, 0, 0, 1, 0), (0,) * 5, (0,) * 5)


def test_an_answer_that_is_no_label_is_none_and_wrong() -> None:
    assert named_label(" b\n", ("a", "b")) == "b"
    assert named_label("B", ("a", "b")) == NO_LABEL
    assert named_label("", ("a", "b")) == NO_LABEL
    assert confusion(["a"], ["a"], ("a", "b"))[0] == ("a", "b")


def test_json_fields() -> None:
    wanted = json.dumps({"name": "x", "items": [{"price": 1.0}, {"price": 2}], "ok": True, "none": []})
    assert field_accuracy(wanted, wanted) == 1.0
    assert field_accuracy(wanted, '{"none": [], "ok": true, "items": [{"price": 1}, {"price": 2.0}], "name": "x"}') == 1
    assert field_accuracy(wanted, '{"name": "y", "items": [{"price": 1}, {"price": 2}], "ok": 1}') == 2 / 5
    assert field_accuracy(wanted, "name: x") == 0.0
    assert field_accuracy('{"a": 1}', '{"a": 1, "b": 2, "c": 3, "d": 4}') == 0.25
    assert field_accuracy("[1, 2]", "[2, 1]") == 0.0
    assert field_accuracy('{"a.b": 1}', '{"a": {"b": 1}}') == 0.0


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        (' {"a": [1]}\n', True),
        ("[]", True),
        ("3", False),
        ('"word"', False),
        ('{"a": NaN}', False),
        ('{"a": 1', False),
        ('```json\n{"a": 1}\n```', False),
        ("[" * 100_000, False),
        ("", False),
    ],
)
def test_json_validity(text: str, valid: bool) -> None:
    assert is_json(text) is valid


def test_rouge_l_equals_the_package_on_english() -> None:
    package = RougeScorer(["rougeL"])
    pairs = list(zip(_sentences(40, 1), _sentences(40, 2), strict=True))
    scores = [rouge_l(*pair) for pair in pairs]
    assert scores == [package.score(*pair)["rougeL"].fmeasure for pair in pairs]
    assert 0.0 < sum(scores) / 40 < 0.6
    assert rouge_l("don't stop_it", "don t stop it") == 1.0


def test_rouge_l_reads_other_scripts() -> None:
    assert rouge_l("打开客厅的灯", "打开客厅的灯") == 1.0
    assert rouge_l("打开客厅的灯", "关上客厅的灯") == pytest.approx(4 / 6)
    assert rouge_l("включи свет", "включи радио") == 0.5
    assert [rouge_l("?!", "?!"), rouge_l("?!", "word"), rouge_l("word", "")] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("seed", range(5))
def test_bleu_equals_sacrebleu(seed: int) -> None:
    expected, got = _sentences(30, seed), _sentences(30, seed + 50)
    got[:10] = expected[:10]
    metric = measure("bleu", _examples(("bleu",), expected, got), ())
    assert metric.value == pytest.approx(BLEU().corpus_score(got, [expected]).score)
    assert metric.low < metric.value < metric.high


def test_bleu_of_chinese_uses_its_tokens() -> None:
    expected, got = ["打开客厅的灯。", "明天早上七点叫我"], ["打开客厅的灯。", "明天晚上七点叫我"]
    assert BleuScorer.for_answers(expected).tokens == "zh"
    assert BleuScorer.for_answers(["turn on the light"]).tokens == "13a"
    value = measure("bleu", _examples(("bleu",), expected, got), ()).value
    assert value == pytest.approx(BLEU(tokenize="zh").corpus_score(got, [expected]).score)


def test_loss_and_perplexity_weigh_tokens_not_rows() -> None:
    examples = _examples((), ["x"] * 6, ["x"] * 6)
    nll, tokens = sum(0.5 + i for i in range(6)), sum(2 + i % 3 for i in range(6))
    loss, perplexity = measure("loss", examples, ()), measure("perplexity", examples, ())
    assert loss.value == pytest.approx(nll / tokens)
    assert perplexity.value == pytest.approx(math.exp(nll / tokens))
    assert (loss.low, loss.high) == pytest.approx((math.log(perplexity.low), math.log(perplexity.high)))
    assert not loss.higher_is_better
    assert loss.unit == "nats/token"


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_measures_compares_and_can_do_without_intervals(name: str) -> None:
    labels = ("1", "2")
    expected = ['{"a": 1}', '{"a": 2}', '{"a": 3}'] * 4 if name.startswith("json") else ["1", "2", "1"] * 4
    good, bad = _examples((name,), expected, expected, labels), _examples((name,), expected, ["[]"] * 12, labels)
    bad = [e.model_copy(update={"scores": {**e.scores, "nll": e.scores["nll"] + 1}}) for e in bad]
    a, b = measure(name, bad, labels), measure(name, good, labels)
    assert a.low <= a.value <= a.high
    plain = measure(name, bad, labels, intervals=False)
    assert (plain.value, plain.low, plain.high) == pytest.approx((a.value, a.value, a.value))
    difference = measure_difference(name, bad, good, labels)
    assert difference.value == pytest.approx(b.value - a.value)
    if name not in ("json_valid", "bleu"):  # [] is valid JSON; one word has no 4-gram
        assert difference.value != 0
        assert (difference.value > 0) == metric_facts(name).higher_is_better
