"""What an evaluation found: one record an example, and metrics with intervals.

This module does not know how examples were produced or scored.
"""

from __future__ import annotations

from pydantic import Field

from tenon.values import Value


class Example(Value):
    """One evaluated row.

    row: its index in the data; source: `file:line`. scores: per-example value of each metric; `nll` is the summed
    negative log likelihood in nats over `tokens` supervised tokens. got is None when nothing was generated.
    """

    row: int
    source: str
    prompt: str
    expected: str
    got: str | None = None
    tokens: int = 0
    scores: dict[str, float] = Field(default={})


class Metric(Value):
    """A figure with its 95% interval (paired bootstrap over rows); low == high == value when it has none."""

    name: str
    value: float
    low: float
    high: float
    unit: str = ""
    higher_is_better: bool = True


class Result(Value):
    """One evaluation of one subject (`base`, an adapter name@version, or a run) on one data set."""

    subject: str
    base_hash: str
    adapter_hash: str | None
    data_hash: str
    template_hash: str
    task: str
    metrics: tuple[Metric, ...]
    examples: tuple[Example, ...]
    labels: tuple[str, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()
    seconds: float = 0.0


class Difference(Value):
    """One metric of two results on the same rows: b minus a, with the interval of the difference."""

    name: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    significant: bool


class Comparison(Value):
    """Two results held against each other, and the plain sentence that says what differs."""

    a: str
    b: str
    rows: int
    differences: tuple[Difference, ...]
    sentence: str
