"""Trackers draw what the events say, with the real packages; a missing one says what to install."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tenon.errors import RunError
from tenon.runs.events import Broadcast
from tenon.runs.folder import RunFolder
from tenon.runs.trackers import open_trackers
from tests.conftest import REPOSITORY

PLAN = {"precision": "fp32", "slots": [{"name": "a", "lora": {"rank": 8, "sites": ["x"]}}], "checkpoint": {"keep": 2}}
# What Tenon's light side needs, and the trackers with their extras.
REQUIREMENTS = {
    "wandb": ["pydantic", "pyyaml", "wandb>=0.19"],
    "mlflow": ["pydantic", "pyyaml", "mlflow-skinny>=3.0", "sqlalchemy>=2.0", "alembic>=1.13"],
}
WORK = """
import sys
from pathlib import Path
from tenon.runs.events import Broadcast
from tenon.runs.folder import RunFolder
from tenon.runs.trackers import open_trackers

run = RunFolder.open(Path(sys.argv[1]))
first, last = int(sys.argv[3]), int(sys.argv[4])
out = Broadcast(run.events, open_trackers([sys.argv[2]], run, offline=True))
out.emit("resume", step=first - 1) if first > 1 else out.emit("start")
for step in range(first, last + 1):
    out.emit("step", slot="a", step=step, loss=1 / step, lr=0.1, progress=0.5)
out.emit("validation", slot="a", step=last, loss=0.25, best=True)
out.close()
assert not [event for event in run.events.read() if event["kind"] == "warning"]
assert "torch" not in sys.modules
"""
READ_MLFLOW = """
import json, sys
from mlflow import MlflowClient

client = MlflowClient(tracking_uri="sqlite:///" + sys.argv[1] + "/trackers/mlflow/mlflow.db")
(run,) = client.search_runs([client.get_experiment_by_name("tenon").experiment_id])
history = client.get_metric_history(run.info.run_id, "a/train/loss")
print(json.dumps({
    "name": run.info.run_name, "status": run.info.status,
    "params": run.data.params, "metrics": sorted(run.data.metrics),
    "loss": [[point.step, point.value] for point in history],
}))
"""
# A .wandb file is a log in LevelDB's format behind a header of 7 bytes: blocks of 32 kB, records of CRC, length, type.
READ_WANDB = """
import glob, json, struct, sys
from wandb.proto import wandb_internal_pb2

def records(data):
    at, whole = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""

points, ids = [], set()
for path in sorted(glob.glob(sys.argv[1] + "/trackers/wandb/wandb/offline-run-*/*.wandb")):
    for data in records(open(path, "rb").read()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            ids.add(record.run.run_id)
        if record.WhichOneof("record_type") == "history":
            points.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
print(json.dumps({"ids": sorted(ids), "points": points}))
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", plan_json=json.dumps(PLAN), recipe_text="base: tiny\n")


def _emit_steps(run: RunFolder, first: int, last: int) -> None:
    out = Broadcast(run.events, open_trackers(["tensorboard"], run, offline=True))
    if first > 1:
        out.emit("resume", step=first - 1)
    for step in range(first, last + 1):
        out.emit("step", slot="a", step=step, loss=1 / step, lr=0.1, progress=0.5, text="not a number")
        out.emit("step", slot="b", step=step, loss=float("nan"), lr=0.2)
    out.emit("validation", slot="a", step=last, loss=0.25, exact=0.5, best=True)
    out.emit("evaluated", slot="a", subject="base", exact=0.125)
    out.close()


def _tensorboard_curves(run: RunFolder, slot: str) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = accumulator.EventAccumulator(str(run.path / "trackers" / "tensorboard" / slot)).Reload()
    return {tag: [(point.step, point.value) for point in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_tensorboard_reads_the_curves_of_each_slot(run: RunFolder) -> None:
    pytest.importorskip("tensorboard")
    _emit_steps(run, 1, 3)
    curves = _tensorboard_curves(run, "a")
    assert set(curves) == {"train/loss", "train/lr", "validation/loss", "validation/exact", "evaluation/base/exact"}
    assert curves["train/loss"] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert curves["validation/exact"] == [(3, 0.5)]
    assert set(_tensorboard_curves(run, "b")) == {"train/lr"}  # a loss that is no number has no point
    assert not [event for event in run.events.read() if event["kind"] == "warning"]


def test_p21_tensorboard_forgets_the_steps_of_a_life_that_was_lost(run: RunFolder) -> None:
    pytest.importorskip("tensorboard")
    _emit_steps(run, 1, 6)
    _emit_steps(run, 4, 5)
    assert [step for step, _ in _tensorboard_curves(run, "a")["train/loss"]] == [1, 2, 3, 4, 5]


def test_an_unknown_tracker_is_refused(run: RunFolder) -> None:
    with pytest.raises(RunError) as caught:
        open_trackers(["clipboard"], run, offline=True)
    assert caught.value.code == "run-tracker-unknown"
    assert caught.value.hint == "choose from tensorboard, wandb, mlflow"


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_says_what_to_install(run: RunFolder, name: str) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed here")
    with pytest.raises(RunError) as caught:
        open_trackers([name], run, offline=True)
    assert caught.value.code == "run-tracker-missing"
    assert f"pip install 'tenonlm[{name}]'" in caught.value.hint


def _python_with(name: str) -> Path:
    """The interpreter of a virtual environment that has one tracker; made once, kept under .cache."""
    key = hashlib.sha256(json.dumps([sys.version, REQUIREMENTS[name]]).encode()).hexdigest()[:16]
    folder = REPOSITORY / ".cache" / "venvs" / key
    python = folder / "bin" / "python"
    if not (folder / "complete").is_file():
        venv.create(folder, with_pip=True, clear=True)
        installed = subprocess.run([python, "-m", "pip", "install", "-q", *REQUIREMENTS[name]], capture_output=True)
        if installed.returncode != 0:
            pytest.skip(f"{name} cannot be installed here: {installed.stderr.decode()[-300:]}")
        (folder / "complete").touch()
    return python


def _in_venv(name: str, code: str, *arguments: str) -> str:
    done = subprocess.run(
        [_python_with(name), "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "MLFLOW_DISABLE_TELEMETRY": "true"},
        cwd=Path(arguments[0]),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_mlflow_reads_the_curves_and_goes_on_after_a_resume(run: RunFolder) -> None:
    _in_venv("mlflow", WORK, str(run.path), "mlflow", "1", "3")
    _in_venv("mlflow", WORK, str(run.path), "mlflow", "4", "5")
    found = json.loads(_in_venv("mlflow", READ_MLFLOW, str(run.path)).splitlines()[-1])
    assert (found["name"], found["status"]) == ("run", "FINISHED")
    assert found["params"] == {
        "precision": "fp32",
        "checkpoint.keep": "2",
        "slots.a.name": "a",
        "slots.a.lora.rank": "8",
    }
    assert found["metrics"] == ["a/train/loss", "a/train/lr", "a/validation/loss"]
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4, 5]
    assert found["loss"][3][1] == 0.25
    assert sorted(place.name for place in run.path.iterdir() if "mlruns" in place.name) == []


@pytest.mark.slow
def test_wandb_writes_offline_files_of_one_run(run: RunFolder) -> None:
    _in_venv("wandb", WORK, str(run.path), "wandb", "1", "3")
    _in_venv("wandb", WORK, str(run.path), "wandb", "4", "5")
    found = json.loads(_in_venv("wandb", READ_WANDB, str(run.path)).splitlines()[-1])
    assert len(found["ids"]) == 1
    train = [point for point in found["points"] if "a/train/loss" in point]
    assert [(point["a/step"], point["a/train/loss"]) for point in train] == [(n, 1 / n) for n in range(1, 6)]
    assert [point["a/validation/loss"] for point in found["points"] if "a/validation/loss" in point] == [0.25, 0.25]
