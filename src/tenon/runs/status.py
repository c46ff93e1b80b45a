"""What state a run is in, told from its files alone: events, lock, checkpoints.

This module asks no process and changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from tenon.runs.events import Event
from tenon.runs.folder import RunFolder
from tenon.runs.lock import holder_of


class RunState(StrEnum):
    """The state of a run, from its last life-cycle event (start, resume, stopped, failed, finished) and its lock.

    planned   no event, lock free: nothing was done yet
    running   lock held, and taken after the last stop, failure or end, if there was one
    stopped   `stopped`: asked to stop, saved; resume it
    failed    `failed`: ended with an error; resume it when the cause is gone
    finished  `finished`: all done
    dead      `start` or `resume`, lock free: killed without a word (SIGKILL, power); resume it
    """

    PLANNED = "planned"
    RUNNING = "running"
    STOPPED = "stopped"
    FAILED = "failed"
    FINISHED = "finished"
    DEAD = "dead"


_ENDINGS = {"stopped": RunState.STOPPED, "failed": RunState.FAILED, "finished": RunState.FINISHED}
_BEGINNINGS = frozenset({"start", "resume"})


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A run at a glance.

    step: the last step done by any slot (0 before the first); checkpoint_step: the newest checkpoint, unverified.
    pid, host: the holder of the lock while running. reason: code and text of a failure. warnings: how many.
    started, updated: unix seconds of the first and the last event; None before the first.
    """

    name: str
    state: RunState
    step: int
    checkpoint_step: int | None
    best_steps: dict[str, int]
    pid: int | None
    host: str | None
    reason: str
    warnings: int
    started: float | None
    updated: float | None


def status(run: RunFolder) -> RunStatus:
    """The status of a run now."""
    first: Event | None = None
    last: Event | None = None
    life: Event | None = None  # the last life-cycle event
    step = warnings = 0
    for event in run.events.read():
        first, last = first or event, event
        kind = event["kind"]
        if kind in _ENDINGS or kind in _BEGINNINGS:
            life = event
        if kind == "step":
            step = max(step, _step(event))
        elif kind in _BEGINNINGS:
            step = _step(event)
        warnings += kind == "warning"
    holder = holder_of(run.path / "lock")
    state = _state(life, holder.since if holder else None)
    steps = run.checkpoints.steps()
    running = state is RunState.RUNNING
    return RunStatus(
        name=run.name,
        state=state,
        step=step,
        checkpoint_step=steps[-1] if steps else None,
        best_steps=run.checkpoints.best_steps(),
        pid=holder.pid if running and holder else None,
        host=holder.host if running and holder else None,
        reason=_reason(life) if state is RunState.FAILED else "",
        warnings=warnings,
        started=_time(first),
        updated=_time(last),
    )


def _state(life: Event | None, held_since: float | None) -> RunState:
    ending = _ENDINGS.get(str(life["kind"])) if life else None
    ended_at = _time(life) if ending else None
    # A worker that has just written its last event holds the lock for a moment longer; one that was started since then
    # holds it because it is at work again.
    if held_since is not None and (ended_at is None or held_since > ended_at):
        return RunState.RUNNING
    if ending is not None:
        return ending
    return RunState.PLANNED if life is None else RunState.DEAD


def _reason(event: Event | None) -> str:
    if event is None:
        return ""
    return ": ".join(str(event[key]) for key in ("code", "text") if event.get(key))


def _step(event: Event) -> int:
    step = event.get("step")
    return step if isinstance(step, int) else 0


def _time(event: Event | None) -> float | None:
    t = event.get("t") if event else None
    return float(t) if isinstance(t, int | float) else None
