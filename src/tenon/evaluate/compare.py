"""Two results on the same rows held against each other, and one plain sentence that says what differs.

This module does not know how results were made.
"""

from __future__ import annotations

from collections.abc import Sequence

from tenon.errors import RunError
from tenon.evaluate.labels import NO_LABEL
from tenon.evaluate.metrics import judged, measure_difference
from tenon.runs.metric_table import metric_facts
from tenon.runs.results import Comparison, Difference, Example, Result


def compare(a: Result, b: Result) -> Comparison:
    """b against a on every metric that both have, in pairs of rows; differences are b minus a.

    Raises RunError run-rows-differ when the two did not judge the same rows.
    """
    _require_same_rows(a, b)
    labels = tuple(dict.fromkeys(name for name in (*a.labels, *b.labels) if name != NO_LABEL))
    measured = {metric.name for metric in b.metrics}
    names = [metric.name for metric in a.metrics if metric.name in measured]
    differences = tuple(_difference(name, a, b, labels) for name in names)
    return Comparison(
        a=a.subject,
        b=b.subject,
        rows=len(a.examples),
        differences=differences,
        sentence=_sentence(a, b, differences),
    )


def _require_same_rows(a: Result, b: Result) -> None:
    reason = ""
    if a.data_hash != b.data_hash:
        reason = "the rows hold different data"
    elif [_key(e) for e in a.examples] != [_key(e) for e in b.examples]:
        reason = "the rows are the same data but not the same selection"
    if reason:
        raise RunError(
            "run-rows-differ",
            f"{a.subject} and {b.subject} were not judged on the same rows: {reason}",
            got=f"{len(a.examples)} and {len(b.examples)} rows, data {a.data_hash[:12]} and {b.data_hash[:12]}",
            hint="judge both on the same data: tenon eval … --data FILE",
        )


def _key(example: Example) -> tuple[int, str, bool]:
    # Where the file lies says nothing about the rows; what they hold is in the data hash.
    return example.row, example.expected, example.got is None


def _difference(name: str, a: Result, b: Result, labels: Sequence[str]) -> Difference:
    interval = measure_difference(name, a.examples, b.examples, labels)
    return Difference(
        name=name,
        a=_value(name, a),
        b=_value(name, b),
        difference=interval.value,
        low=interval.low,
        high=interval.high,
        significant=interval.excludes(0.0),
    )


def _value(name: str, result: Result) -> float:
    return next(metric.value for metric in result.metrics if metric.name == name)


# ---- the sentence ----------------------------------------------------------------------------------------------------


def _sentence(a: Result, b: Result, differences: Sequence[Difference]) -> str:
    """The first metric decides; others are named where they tell the subjects apart and the first does not, or where
    they say the opposite.
    """
    names = f"{_who(b.subject)} and {_who(a.subject)}"
    if not differences:
        return f"{names} have no metric in common"
    # Perplexity says again what the loss says.
    named = {d.name for d in differences}
    first, others = differences[0], [d for d in differences[1:] if not (d.name == "perplexity" and "loss" in named)]
    rows = len(judged(first.name, a.examples))
    counted = f"{rows} row" + ("s" if rows != 1 else "")
    if not first.significant:
        told = (
            f"no difference between {names} on {_says(first)} can be told apart at 95% "
            f"({_who(b.subject)} by {_amount(first, first.difference, signed=True)}, {_interval(first)}; {counted})"
        )
        further = [d for d in others if d.significant]
    else:
        told = (
            f"{_who(b.subject)} is {_direction(first)} than {_who(a.subject)} on {_says(first)} "
            f"by {_amount(first, abs(first.difference))} ({_interval(first)}; {counted})"
        )
        further = [d for d in others if d.significant and _is_better(d) != _is_better(first)]
    clauses = [f"on {_says(d)} it is {_direction(d)} by {_amount(d, abs(d.difference))}" for d in further]
    if not first.significant and clauses:
        clauses[0] = clauses[0].replace(" it is ", f" {_who(b.subject)} is ", 1)
    return told + "".join(f"; {clause}" for clause in clauses)


def _who(label: str) -> str:
    return "base" if label == "base" else f"adapter {label}"


def _says(difference: Difference) -> str:
    return metric_facts(difference.name).says


def _is_better(difference: Difference) -> bool:
    return (difference.difference > 0) == metric_facts(difference.name).higher_is_better


def _direction(difference: Difference) -> str:
    return "better" if _is_better(difference) else "worse"


def _interval(difference: Difference) -> str:
    """The interval's ends; of a significant difference their sizes, in the direction of the sentence."""
    low, high = difference.low, difference.high
    if difference.significant and high <= 0:
        low, high = -high, -low
    shares = metric_facts(difference.name).unit == "share"
    return f"95% interval {_number(low, shares=shares)} to {_number(high, shares=shares)}"


def _amount(difference: Difference, value: float, *, signed: bool = False) -> str:
    """A difference with its unit: points for shares and BLEU."""
    unit = metric_facts(difference.name).unit
    number = _number(value, shares=unit == "share")
    number = f"+{number}" if signed and value > 0 else number
    points = unit == "share" or difference.name == "bleu"
    return f"{number} points" if points else f"{number} nats a token" if unit == "nats/token" else number


def _number(value: float, *, shares: bool) -> str:
    """Shares as points with one digit after the point, all else with three significant digits."""
    text = f"{100 * value:.1f}".removesuffix(".0") if shares else f"{value:.3g}"
    return "0" if text in ("-0", "-0.0") else text
