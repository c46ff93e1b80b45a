"""Whether the GPUs wait, and for what: decided from measured shares of the steps, never from a guess at the hardware.

Samples come from the sampling thread, steps from the loop. Only samples that fall into a step count: a GPU may idle
while a checkpoint is written. This module does not know where samples come from nor how a warning is shown.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

from tenon.runs.events import Event
from tenon.units import format_count, format_share

Cause = Literal["data", "batch", "host"]

BUSY_PERCENT = 80.0
# A window is long enough that one slow step, or one odd sample, decides nothing.
WINDOW_SECONDS = 20.0
WINDOW_STEPS = 5
WINDOW_SAMPLES = 5
# Kernels are compiled and tuned in the first steps.
WARM_STEPS = 3


@dataclass(frozen=True, slots=True)
class Verdict:
    """A window of steps in which the GPUs waited: how busy they were (percent), the likely cause, and what to do."""

    utilisation_percent: float
    cause: Cause
    text: str


@dataclass
class _Step:
    """One optimiser step, whatever the number of its slots. end: unix seconds; tokens: of all slots."""

    end: float
    seconds: float
    data_seconds: float
    tokens: int = 0


@dataclass
class _Window:
    seconds: float = 0.0
    data_seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    percents: float = 0.0
    samples: int = 0

    @property
    def full(self) -> bool:
        """Whether it says enough."""
        return self.seconds >= WINDOW_SECONDS and self.steps >= WINDOW_STEPS and self.samples >= WINDOW_SAMPLES


class UtilisationWatch:
    """Gathers samples and steps into windows. micro_tokens: what the run can compute at once."""

    def __init__(self, *, micro_tokens: int) -> None:
        self._micro_tokens = micro_tokens
        self._samples: deque[tuple[float, float]] = deque(maxlen=100_000)
        self._step: _Step | None = None
        self._seen = 0
        self._window = _Window()

    def take_sample(self, t: float, utilisation_percent: float) -> None:
        """A sample at unix second t, the mean over the GPUs. May be called from another thread."""
        self._samples.append((t, utilisation_percent))

    def take_step(self, event: Event) -> Verdict | None:
        """A `step` event; a verdict when it completes a window in which the GPUs waited."""
        seconds, data_seconds = _number(event, "seconds"), _number(event, "data_seconds")
        step = self._step
        verdict = None
        # The slots of one step report the same times, one after another.
        if step is None or (step.seconds, step.data_seconds) != (seconds, data_seconds):
            if step is not None:
                verdict = self._close(step)
            self._step = step = _Step(_number(event, "t"), seconds, data_seconds)
        step.tokens += int(_number(event, "tokens"))
        return verdict

    def _close(self, step: _Step) -> Verdict | None:
        self._seen += 1
        inside = self._samples_of(step)
        if self._seen <= WARM_STEPS:
            return None
        window = self._window
        window.seconds += step.seconds
        window.data_seconds += step.data_seconds
        window.tokens += step.tokens
        window.steps += 1
        window.percents += sum(inside)
        window.samples += len(inside)
        if not window.full:
            return None
        self._window = _Window()
        return self._judge(window)

    def _samples_of(self, step: _Step) -> list[float]:
        """The samples within a step; older ones are forgotten."""
        inside: list[float] = []
        while self._samples and self._samples[0][0] <= step.end:
            t, percent = self._samples.popleft()
            if t >= step.end - step.seconds:
                inside.append(percent)
        return inside

    def _judge(self, window: _Window) -> Verdict | None:
        percent = window.percents / window.samples
        if percent >= BUSY_PERCENT:
            return None
        idle, waiting = 1 - percent / 100, window.data_seconds / window.seconds
        tokens = window.tokens // window.steps
        cause: Cause = "data" if waiting >= idle / 2 else "batch" if tokens < self._micro_tokens else "host"
        why = _why(cause, waiting, tokens, self._micro_tokens)
        return Verdict(percent, cause, f"the GPU is busy {percent:.0f}% of the time; {why}")


def _why(cause: Cause, waiting: float, tokens: int, micro_tokens: int) -> str:
    """What is likely, with its figures, and what to do. waiting: share of the time; tokens: of a step."""
    if cause == "data":
        return f"steps wait for their rows {format_share(waiting)} of the time: look at the disk with `tenon doctor`"
    if cause == "batch":
        return (
            f"a step has {format_count(tokens)} tokens where {format_count(micro_tokens)} fit at once, so that kernels "
            "take longer to start than to run: raise batch.rows or batch.tokens"
        )
    return (
        "rows are there and the batches are full, so the host is too slow to start the kernels: free its cores from "
        "other work, or raise batch.micro_tokens"
    )


def _number(event: Event, key: str) -> float:
    value = event.get(key)
    return float(value) if isinstance(value, int | float) else 0.0
