"""TensorBoard, Weights & Biases and MLflow as event sinks: each is told the events of a run and draws its curves.

Each needs its own extra (`tenonlm[tensorboard]`, `[wandb]`, `[mlflow]`), imported only when asked for. All they write
locally lies in RUN/trackers/. Offline, Weights & Biases writes files for `wandb sync`, and MLflow an SQLite file;
online, each goes where its own configuration says. A run that resumes goes on with the same tracker run.

`step` events are drawn as `train/…`, `validation` and `evaluated` events under their own kind, by slot and step. This
module does not know what the figures mean, and does not isolate failures: events.Broadcast does.
"""

from __future__ import annotations

import importlib
import json
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tenon.errors import RunError
from tenon.runs.events import Event, EventSink
from tenon.runs.folder import RunFolder

_GROUPS = {"step": "train", "validation": "validation", "evaluated": "evaluation"}
# Where the run stands and what is left: a live view's figures, no curves.
_NOT_CURVES = frozenset({"t", "step", "steps", "progress", "seconds_left", "best"})
_MLFLOW_BUFFER_SECONDS = 5.0
_MLFLOW_BATCH = 100  # the most parameters that one call may carry


def open_trackers(names: Sequence[str], run: RunFolder, *, offline: bool) -> list[EventSink]:
    """The sinks of the named trackers, opened.

    Raises RunError run-tracker-missing when a package is not installed, run-tracker-failed when a tracker refuses to
    start (no login, no server), run-tracker-unknown.
    """
    openers: dict[str, Callable[[RunFolder, bool], EventSink]] = {
        "tensorboard": lambda run, _offline: TensorBoardSink(run),
        "wandb": lambda run, offline: WandbSink(run, offline=offline),
        "mlflow": lambda run, offline: MlflowSink(run, offline=offline),
    }
    sinks: list[EventSink] = []
    for name in names:
        if name not in openers:
            raise RunError(
                "run-tracker-unknown", f"there is no tracker {name!r}", hint=f"choose from {', '.join(openers)}"
            )
        sinks.append(openers[name](run, offline))
    return sinks


class TensorBoardSink:
    """Event files under RUN/trackers/tensorboard/SLOT, so that slots lie over each other in one chart."""

    def __init__(self, run: RunFolder) -> None:
        self._folder = _tracker_folder(run, "tensorboard")
        self._writer = _require("tensorboard.summary.writer.event_file_writer", "tensorboard").EventFileWriter
        self._event = _require("tensorboard.compat.proto.event_pb2", "tensorboard")
        self._summary = _require("tensorboard.compat.proto.summary_pb2", "tensorboard").Summary
        self._writers: dict[str, Any] = {}
        # Charts forget what lies beyond the step that a run resumed from; 0 says nothing is to be forgotten.
        self._purge_from = 0

    def emit(self, event: Event) -> None:
        """Add one point to each curve."""
        if event["kind"] in {"start", "resume"}:
            self._purge_from = int(event.get("step") or 0) + 1
        slot, step, points = _points(event)
        if not points:
            return
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in points.items()]
        message = self._event.Event(wall_time=event["t"], step=step, summary=self._summary(value=values))
        self._writer_of(slot, float(event["t"] or 0)).add_event(message)

    def close(self) -> None:
        """Flush and close every file."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _writer_of(self, slot: str, t: float) -> Any:
        if slot not in self._writers:
            self._writers[slot] = self._writer(str(self._folder / (slot or "run")), flush_secs=10)
            if self._purge_from:
                start = self._event.SessionLog(status=self._event.SessionLog.START)
                self._writers[slot].add_event(self._event.Event(wall_time=t, step=self._purge_from, session_log=start))
        return self._writers[slot]


class WandbSink:
    """One Weights & Biases run in the project `tenon`; keys are SLOT/train/loss over SLOT/step."""

    def __init__(self, run: RunFolder, *, offline: bool) -> None:
        wandb = _require("wandb", "wandb")
        folder = _tracker_folder(run, "wandb")
        try:
            self._run = wandb.init(
                project="tenon",
                name=run.name,
                id=_kept_id(folder / "id", lambda: secrets.token_hex(8)),
                resume=None if offline else "allow",
                mode="offline" if offline else None,
                dir=folder,
                config=_flat_plan(run),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            raise _refused("wandb", error) from error
        self._slots: set[str] = set()

    def emit(self, event: Event) -> None:
        """Add one point to each curve."""
        slot, step, points = _points(event)
        if not points:
            return
        prefix = f"{slot}/" if slot else ""
        if slot not in self._slots:
            self._slots.add(slot)
            self._run.define_metric(f"{prefix}*", step_metric=f"{prefix}step")
        self._run.log({f"{prefix}{tag}": value for tag, value in points.items()} | {f"{prefix}step": step})

    def close(self) -> None:
        """Finish the run, waiting for what is under way."""
        self._run.finish()


class MlflowSink:
    """One MLflow run in the experiment `tenon`; points are sent a few seconds' worth at a time.

    Online, and with a tracking server configured, they go there; else into RUN/trackers/mlflow/mlflow.db
    (`mlflow ui --backend-store-uri sqlite:///…`). MLflow keeps both points of a step that was done twice.
    """

    def __init__(self, run: RunFolder, *, offline: bool) -> None:
        mlflow = _require("mlflow", "mlflow")
        _require("sqlalchemy", "mlflow")
        self._entities = _require("mlflow.entities", "mlflow")
        self._waiting: list[Any] = []
        self._sent_at = 0.0
        folder = _tracker_folder(run, "mlflow").absolute()
        server = None if not offline and mlflow.is_tracking_uri_set() else f"sqlite:///{folder}/mlflow.db"
        try:
            self._client = mlflow.MlflowClient(tracking_uri=server)
            self._run_id = _kept_id(folder / "id", lambda: self._new_run(run))
            self._client.update_run(self._run_id, status="RUNNING")
        except mlflow.exceptions.MlflowException as error:
            raise _refused("mlflow", error) from error

    def emit(self, event: Event) -> None:
        """Add one point to each curve."""
        slot, step, points = _points(event)
        t = float(event["t"] or 0)
        prefix = f"{slot}/" if slot else ""
        self._waiting += [
            self._entities.Metric(f"{prefix}{tag}", value, int(t * 1000), step) for tag, value in points.items()
        ]
        if self._waiting and t - self._sent_at >= _MLFLOW_BUFFER_SECONDS:
            self._send()
            self._sent_at = t

    def close(self) -> None:
        """Send what waits and end the run."""
        self._send()
        self._client.set_terminated(self._run_id)

    def _send(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:1000], self._waiting[1000:]
            self._client.log_batch(self._run_id, metrics=batch)

    def _new_run(self, run: RunFolder) -> str:
        experiment = self._client.get_experiment_by_name("tenon")
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment("tenon")
        run_id = self._client.create_run(experiment_id, run_name=run.name).info.run_id
        params = [self._entities.Param(key, str(value)[:500]) for key, value in _flat_plan(run).items()]
        for start in range(0, len(params), _MLFLOW_BATCH):
            self._client.log_batch(run_id, params=params[start : start + _MLFLOW_BATCH])
        return run_id


def _points(event: Event) -> tuple[str, int, dict[str, float]]:
    """(slot, step, tag -> finite value) that an event adds to curves."""
    group = _GROUPS.get(str(event["kind"]))
    if group is None:
        return "", 0, {}
    step = event.get("step")
    values = {
        f"{group}/{key}": float(value)
        for key, value in event.items()
        if key not in _NOT_CURVES and isinstance(value, int | float) and not isinstance(value, bool)
    }
    finite = {tag: value for tag, value in values.items() if math.isfinite(value)}
    if group == "evaluation":  # base and adapter are measured after training, at no step
        finite = {tag.replace("/", f"/{event.get('subject')}/", 1): value for tag, value in finite.items()}
    return str(event.get("slot") or ""), step if isinstance(step, int) else 0, finite


def _flat_plan(run: RunFolder) -> dict[str, Any]:
    """The plan's plain values by dotted key; slots by name; lists and reasons left out."""
    flat: dict[str, Any] = {}

    def add(prefix: str, tree: Any) -> None:
        if isinstance(tree, Mapping):
            for key, value in tree.items():
                add(f"{prefix}.{key}" if prefix else str(key), value)
        elif isinstance(tree, str | int | float):
            flat[prefix] = tree

    plan = json.loads(run.plan_json())
    slots = plan.pop("slots", [])
    add("", plan)
    add("slots", {slot["name"]: slot for slot in slots})
    return flat


def _kept_id(path: Path, make: Callable[[], str]) -> str:
    """The identity of the tracker's run: made once, kept for the run's later lives."""
    if path.is_file():
        return path.read_text()
    made = make()
    path.write_text(made)
    return made


def _tracker_folder(run: RunFolder, name: str) -> Path:
    folder = run.path / "trackers" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _require(module: str, extra: str) -> Any:
    """A tracker's module. Raises RunError run-tracker-missing, with what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RunError(
            "run-tracker-missing",
            f"the tracker {extra} needs a package that is not installed",
            got=str(error),
            hint=f"pip install 'tenonlm[{extra}]', or leave {extra} out of `trackers`",
        ) from error


def _refused(name: str, error: Exception) -> RunError:
    return RunError(
        "run-tracker-failed",
        f"the tracker {name} did not start",
        got=str(error)[:200],
        hint=f"configure {name}; or set TENON_OFFLINE=1, which keeps its files in the run folder",
    )
