"""Comparisons: what the sentence says, and that other rows are refused."""

from __future__ import annotations

import pytest

from tenon.errors import RunError
from tenon.evaluate.compare import compare
from tenon.evaluate.metrics import measure, row_scores
from tenon.runs.results import Example, Result


def _result(
    subject: str, right: list[bool], *, names: tuple[str, ...] = ("exact", "loss"), nll: float = 1.0, data: str = "d"
) -> Result:
    got = ["yes" if ok else "no" for ok in right]
    scores = row_scores(names, ["yes"] * len(right), got, ())
    examples = tuple(
        Example(
            row=i,
            source=f"f:{i}",
            prompt="?",
            expected="yes",
            got=g,
            tokens=2,
            scores={"nll": nll + 0.01 * (i % 7), **s},
        )
        for i, (g, s) in enumerate(zip(got, scores, strict=True))
    )
    return Result(
        subject=subject,
        base_hash="b",
        adapter_hash=None,
        data_hash=data,
        template_hash="t",
        task="text",
        metrics=tuple(measure(name, examples, ()) for name in names),
        examples=examples,
    )


def test_a_better_adapter() -> None:
    base = _result("base", [i < 15 for i in range(200)])
    adapter = _result("home@1", [i < 178 for i in range(200)], nll=0.2)
    found = compare(base, adapter)
    exact, loss = found.differences
    assert (found.a, found.b, found.rows) == ("base", "home@1", 200)
    assert exact.difference == pytest.approx(0.815)
    assert exact.significant and loss.significant
    assert found.sentence.startswith("adapter home@1 is better than base on exact match by 81.5 points (95% interval 7")
    assert found.sentence.endswith("; 200 rows)")


def test_a_worse_adapter_gives_the_mirror_image() -> None:
    base = _result("base", [i < 15 for i in range(200)])
    adapter = _result("home@1", [i < 178 for i in range(200)], nll=0.2)
    there, back = compare(base, adapter), compare(adapter, base)
    assert back.sentence.startswith("base is worse than adapter home@1 on exact match by 81.5 points (95% interval 7")
    assert back.differences[0].low == pytest.approx(-there.differences[0].high, abs=1e-9)
    assert there.sentence.split("interval ")[1] == back.sentence.split("interval ")[1]


def test_no_difference_can_be_told_apart() -> None:
    a = _result("home@1", [i % 3 == 0 for i in range(60)])
    b = _result("home@2", [i % 3 == 1 for i in range(60)])
    found = compare(a, b)
    assert not any(d.significant for d in found.differences)
    assert found.sentence.startswith(
        "no difference between adapter home@2 and adapter home@1 on exact match can be told apart at 95% "
        "(adapter home@2 by 0 points, 95% interval -"
    )
    assert found.sentence.endswith("; 60 rows)")


def test_the_same_subject_against_itself() -> None:
    a = _result("base", [True, False, True])
    found = compare(a, a)
    assert [(d.difference, d.low, d.high) for d in found.differences] == [(0, 0, 0)] * 2
    assert "can be told apart at 95% (base by 0 points, 95% interval 0 to 0; 3 rows)" in found.sentence


def test_an_opposite_second_metric_is_named() -> None:
    base = _result("base", [False] * 50, nll=1.0)
    adapter = _result("x", [True] * 50, nll=3.0)
    assert compare(base, adapter).sentence.endswith("; 50 rows); on loss it is worse by 1 nats a token")


def test_a_second_metric_that_tells_them_apart_is_named() -> None:
    base = _result("base", [i < 25 for i in range(50)], nll=1.0)
    adapter = _result("x", [i < 25 for i in range(50)], nll=0.5)
    sentence = compare(base, adapter).sentence
    assert sentence.startswith("no difference between adapter x and base on exact match")
    assert sentence.endswith("; on loss adapter x is better by 0.25 nats a token")


def test_only_common_metrics_are_compared() -> None:
    a, b = _result("base", [True] * 5), _result("x", [True] * 5, names=("loss",))
    assert [d.name for d in compare(a, b).differences] == ["loss"]
    none = b.model_copy(update={"metrics": ()})
    assert compare(a, none).sentence == "adapter x and base have no metric in common"


def test_other_rows_are_refused() -> None:
    a = _result("base", [True] * 5)
    with pytest.raises(RunError, match="run-rows-differ"):
        compare(a, _result("x", [True] * 5, data="e"))
    with pytest.raises(RunError, match="run-rows-differ"):
        compare(a, _result("x", [True] * 4))


def test_a_comparison_is_a_value() -> None:
    found = compare(_result("base", [True, False]), _result("x", [True, True]))
    assert type(found).from_json(found.to_json()) == found
