"""What is known of running work, gathered from its events: the state behind every live view.

This module does not know terminals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias

from tenon.runs.metric_table import METRICS

Event: TypeAlias = dict[str, Any]

_HISTORY = 2000
# One noisy step says little: the loss that is shown is a running mean over about this many steps.
_SMOOTHING_STEPS = 10
SPARKS = "▁▂▃▄▅▆▇█"


@dataclass
class SlotState:
    """The newest figures of one slot."""

    name: str
    step: int = 0
    steps: int = 0
    progress: float = 0.0
    loss: float = math.nan
    lr: float = math.nan
    losses: list[float] = field(default_factory=list)
    validation: str = ""

    def take_step(self, event: Event) -> None:
        """A `step` event of this slot."""
        self.step = int(event.get("step", self.step))
        self.steps = int(event.get("steps") or 0)
        self.progress = number(event.get("progress"), self.progress)
        self.lr = number(event.get("lr"), self.lr)
        loss = number(event.get("loss"))
        if math.isfinite(loss):
            share = max(1 / _SMOOTHING_STEPS, 1 / (len(self.losses) + 1))
            self.loss = loss if math.isnan(self.loss) else self.loss + share * (loss - self.loss)
            self.losses.append(loss)
            del self.losses[:-_HISTORY]

    @property
    def total_steps(self) -> int:
        """Steps of the whole run: as it says, or as far as its progress tells."""
        if self.steps:
            return self.steps
        return max(self.step, round(self.step / self.progress)) if self.progress > 0 else self.step


@dataclass
class WorkState:
    """Everything that a live view shows."""

    phase: str = "starting"
    detail: str = ""
    what: str = ""
    done: int = 0
    total: int = 0
    slots: dict[str, SlotState] = field(default_factory=dict)
    tokens: int = 0
    tokens_per_second: float = math.nan
    seconds_left: float = math.nan
    memory_bytes: int = 0
    gpus: dict[int, Event] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def take(self, event: Event) -> None:
        """Take in one event. New things worth a line of their own are added to `notes`."""
        kind = event["kind"]
        if kind == "phase":
            self.phase, self.detail = str(event["name"]), str(event.get("detail") or "")
            self.what, self.done, self.total = "", 0, 0
        elif kind == "progress":
            self.what = str(event.get("what") or "")
            self.done, self.total = int(event.get("done") or 0), int(event.get("total") or 0)
        elif kind == "step":
            self._take_step(event)
        elif kind == "gpu":
            self.gpus[int(event.get("gpu") or 0)] = event
        elif kind == "validation":
            note = f"step {event.get('step')}: {metrics_text(event)}"
            self.slot(str(event.get("slot", ""))).validation = note
            self.notes.append("validation" + (f" of {event['slot']}" if len(self.slots) > 1 else "") + f", {note}")
        elif kind == "memory" and event.get("step") is None:  # else a warning has said it
            self.notes.append(f"memory: {event.get('text')}")
        elif kind == "warning":
            self.notes.append(f"warning: {event.get('text')}")

    def slot(self, name: str) -> SlotState:
        """The state of one slot, made when it is first seen."""
        return self.slots.setdefault(name, SlotState(name))

    def _take_step(self, event: Event) -> None:
        self.phase = "train"
        self.slot(str(event.get("slot", ""))).take_step(event)
        self.tokens = int(event.get("tokens") or self.tokens)
        self.tokens_per_second = number(event.get("tokens_per_second"), self.tokens_per_second)
        self.seconds_left = number(event.get("seconds_left"), self.seconds_left)
        self.memory_bytes = max(self.memory_bytes, int(event.get("memory_bytes") or 0))


_NOT_METRICS = {"t", "kind", "slot", "step", "seconds", "rows", "best", "tokens"}


def metrics_text(event: Event) -> str:
    """`loss 0.512, exact 88.1%` of a validation event: every number in it that is a metric."""
    figures = [(key, value) for key, value in event.items() if key not in _NOT_METRICS and _is_figure(value)]
    return ", ".join(f"{name} {figure_text(name, float(value))}" for name, value in figures)


def figure_text(name: str, value: float, unit: str = "") -> str:
    """A metric for people: shares as percent, everything else with four digits that matter."""
    if not math.isfinite(value):
        return "-"
    if not unit and name in METRICS:
        unit = METRICS[name].unit
    return f"{100 * value:.1f}%" if unit == "share" else f"{value:.4g}"


def sparkline(values: list[float], columns: int) -> str:
    """A curve in one line of text; each column is the mean of its share of the values."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite or columns < 1:
        return ""
    columns = min(columns, len(finite))
    bounds = [round(index * len(finite) / columns) for index in range(columns + 1)]
    means = [sum(finite[low:high]) / (high - low) for low, high in pairwise(bounds)]
    low, high = min(means), max(means)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((mean - low) * scale)] for mean in means)


def number(value: Any, otherwise: float = math.nan) -> float:
    """A figure of an event; events spell non-finite ones as text."""
    if isinstance(value, bool) or value is None:
        return otherwise
    if isinstance(value, int | float):
        return float(value)
    return float(value) if value in ("nan", "inf", "-inf") else otherwise


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
