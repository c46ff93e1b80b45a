"""Training as a user has it: start a planned run, follow it, stop it, resume it.

This module does not know how a plan is made (service.plans), how training works, nor screens.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from tenon.errors import RunError, StopRequestedError, TenonError
from tenon.plan.devices import respread
from tenon.plan.machine import read_machine
from tenon.plan.values import Plan
from tenon.processes import Event, Worker, revive_error, start_worker
from tenon.runs.atomic import remove_folder
from tenon.runs.events import follow_events
from tenon.runs.folder import RunFolder
from tenon.runs.status import RunState, status
from tenon.service.environment import require_training
from tenon.service.runs import read_plan
from tenon.settings import Settings

POLL_SECONDS = 0.1
_KEEPS_RUN = ("run-worker-", "run-disk-full", "run-busy", "train-gpu-lost", "train-rank-lost")


class Training:
    """A run that a worker process works on."""

    def __init__(self, run: RunFolder, worker: Worker, *, started: float) -> None:
        self.run = run
        self.worker = worker
        self._started = started

    def events(self) -> Iterator[Event]:
        """Events of this life of the run as they come, until the worker has ended."""
        for event in follow_events(
            self.run.path / "events.jsonl", stop=lambda: not self.worker.running, poll_seconds=POLL_SECONDS
        ):
            if event["t"] is not None and float(event["t"]) >= self._started:
                yield event

    def finish(self) -> None:
        """Wait for the end. Raises what the worker raised; StopRequestedError when the run was stopped and saved."""
        try:
            self.worker.finish()
        except RunError as error:
            told = self._last_words() if error.code == "run-worker-failed" else None
            if told is None:
                raise
            raise told from error

    def _last_words(self) -> TenonError | None:
        """The error that this life of the run left in its events when the worker could not tell it any more."""
        told: TenonError | None = None
        for event in self.run.events.read():
            if event["kind"] == "failed" and float(event["t"] or 0.0) >= self._started and event.get("hint"):
                told = revive_error({**event, "what": event.get("text")})
        return told


def create_run(plan: Plan, recipe_texts: Mapping[str, str]) -> RunFolder:
    """Write a plan into its run folder. recipe_texts: slot -> the recipe as given. Raises RunError (see RunFolder)."""
    texts: str | Mapping[str, str] = next(iter(recipe_texts.values())) if len(recipe_texts) == 1 else recipe_texts
    return RunFolder.create(Path(plan.run_folder), plan_json=plan.to_json(), recipe_text=texts)


@contextmanager
def new_run(plan: Plan, recipe_texts: Mapping[str, str]) -> Iterator[RunFolder]:
    """`create_run`, to be worked on. What ends it with an error before its first step leaves no run behind.

    The error says all that the folder could, and the folder is free for the next try. A run is kept when there is more
    to see or to save: it was stopped, the disk was full, or its worker died and left a log.
    """
    run = create_run(plan, recipe_texts)
    try:
        yield run
    except StopRequestedError:
        raise
    except TenonError as error:
        now = status(run)
        if not error.code.startswith(_KEEPS_RUN) and now.step == 0 and now.checkpoint_step is None:
            with suppress(OSError):  # a mounted disk, say, stays where it is
                remove_folder(run.path)
        raise


def start_training(run: RunFolder, settings: Settings, *, detach: bool = False, devices: int | None = None) -> Training:
    """Start, or go on with, the run in a worker process, or in one for each of its devices.

    detach: it does not end with this process. devices: another number of them than planned; the rows and their order
    stay. Raises RunError run-finished and run-busy, PlanError plan-devices and plan-memory, before anything is started;
    those of `require_training`.
    """
    require_training()
    _require_resumable(run)
    plan = read_plan(run)
    if devices is not None and devices != plan.devices.count:
        plan = respread(plan, devices, read_machine(settings, run_folder=run.path))
    started = time.time()
    worker = start_worker(
        "train",
        run.path,
        settings=settings,
        log=run.path / "worker.log",
        detach=detach,
        processes=plan.devices.count,
    )
    return Training(run, worker, started=started)


@contextmanager
def signals_stop(worker: Worker, on_stop: Callable[[bool], None]) -> Iterator[None]:
    """Pass Ctrl-C and SIGTERM on to the worker: the first asks it to save and end, the second kills it.

    on_stop: told each time; True for the first. Main thread only.
    """

    def handler(_number: int, _frame: FrameType | None) -> None:
        on_stop(not worker.stopping)
        worker.stop()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _require_resumable(run: RunFolder) -> None:
    now = status(run)
    if now.state is RunState.FINISHED:
        raise RunError(
            "run-finished",
            f"{run.path}: the run is finished, there is nothing to resume",
            got=f"{now.step} steps done",
            hint=f"look at it: tenon show {run.path}; to train longer, start a new run with a higher limit",
        )
    if now.state is RunState.RUNNING:
        raise RunError(
            "run-busy",
            f"{run.path}: the run is in use by process {now.pid} on {now.host}",
            hint="wait for it, or stop it first (Ctrl-C or `kill -TERM` saves a checkpoint)",
        )
