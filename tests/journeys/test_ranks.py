"""Runs of several processes on a CPU, through the real worker and torchrun: what they learn, and how they end."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.survival import Outcome, finish, outcome
from tenon.errors import AdapterError, StopRequestedError, TrainError
from tenon.plan.values import DevicesPlan, Plan
from tenon.runs.events import read_events
from tenon.runs.folder import RunFolder
from tenon.service.training import Training, start_training
from tests.journeys.test_survival import wait_for_step
from tests.journeys.world import World, make_world

pytestmark = pytest.mark.slow
OVERRIDES = ("limits.epochs=6", "checkpoint.every=4", "evaluate.metrics=[]", "register=false")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("ranks"))


def plan_run(world: World, name: str, devices: int, *, sharded: bool = False) -> Path:
    run = world.plan_run(world.root / "runs" / name, *OVERRIDES, f"devices={devices}")
    if sharded:
        plan = Plan.from_json((run / "plan.json").read_text())
        spread = plan.model_copy(update={"devices": DevicesPlan(count=devices, sharded=True)})
        (run / "plan.json").write_text(spread.to_json())
    return run


def start(world: World, run: Path, devices: int | None = None) -> Training:
    return start_training(RunFolder.open(run), world.settings, devices=devices)


def complete(world: World, run: Path, devices: int | None = None) -> Outcome:
    start(world, run, devices).finish()
    return outcome(run)


def adapter(run: Path) -> dict[str, torch.Tensor]:
    (file,) = run.glob("adapter/*/adapter_model.safetensors")
    return load_file(file)


def assert_close(run: Path, other: Path) -> None:
    """Equal up to the order in which sums are rounded, after every step and at the end."""
    a, b = adapter(run), adapter(other)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], rtol=1e-3, atol=1e-5)
    assert outcome(run).losses == pytest.approx(outcome(other).losses, abs=1e-4)


def ranks_of(training: Training) -> list[psutil.Process]:
    """The processes of the ranks, by rank."""
    found = [p for p in psutil.Process(training.worker.pid).children() if "tenon.worker" in " ".join(p.cmdline())]
    return sorted(found, key=lambda process: int(process.environ()["RANK"]))


def events_of(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run / "events.jsonl") if event["kind"] == kind]


@pytest.fixture(scope="module")
def alone(world: World) -> Path:
    run = plan_run(world, "alone", 1)
    finish(world, run)
    return run


@pytest.fixture(scope="module")
def two(world: World) -> Path:
    run = plan_run(world, "two", 2)
    complete(world, run)
    return run


def test_p03_two_ranks_learn_what_one_does(alone: Path, two: Path) -> None:
    assert_close(two, alone)
    (began,) = events_of(two, "start")
    assert began["ranks"] == 2
    # One rank alone writes.
    assert len(events_of(two, "step")) == len(events_of(alone, "step")) > 60
    assert len(events_of(two, "validation")) == len(events_of(alone, "validation")) > 2
    assert [e["step"] for e in events_of(two, "checkpoint")] == [e["step"] for e in events_of(alone, "checkpoint")]
    assert [e["rows"] for e in events_of(two, "step")] == [e["rows"] for e in events_of(alone, "step")]


def test_a_base_spread_over_two_ranks_gives_the_bits_of_two_whole_ones(world: World, two: Path) -> None:
    run = plan_run(world, "spread", 2, sharded=True)
    assert complete(world, run) == outcome(two)


@pytest.mark.parametrize("sharded", [False, True])
def test_p24_a_stop_reaches_all_ranks_and_the_run_goes_on_bit_for_bit(world: World, two: Path, sharded: bool) -> None:
    run = plan_run(world, f"stopped-{sharded}", 2, sharded=sharded)
    training = start(world, run)
    wait_for_step(run, 18)
    sent = time.monotonic()
    training.worker.stop()
    with pytest.raises(StopRequestedError):
        training.finish()
    assert time.monotonic() - sent < 20
    last = list(read_events(run / "events.jsonl"))[-1]
    assert last["kind"] == "stopped"
    assert (run / "checkpoints" / f"step-{last['step']:08d}").is_dir()
    assert complete(world, run) == outcome(two)


def test_a_run_goes_on_with_another_number_of_ranks(world: World, alone: Path) -> None:
    run = plan_run(world, "changing", 2)
    for devices, step in ((2, 10), (1, 25), (2, 40)):
        training = start(world, run, devices)
        wait_for_step(run, step)
        training.worker.stop()
        with pytest.raises(StopRequestedError):
            training.finish()
    complete(world, run, 1)
    assert [event["ranks"] for event in events_of(run, "resume")] == [1, 2, 1]
    assert_close(run, alone)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_is_killed_ends_the_run_with_one_error(world: World, two: Path, lost: int) -> None:
    run = plan_run(world, f"lost-{lost}", 2)
    training = start(world, run)
    wait_for_step(run, 18)
    ranks = ranks_of(training)
    assert len(ranks) == 2
    ranks[lost].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    with pytest.raises(TrainError) as error:
        training.finish()
    assert error.value.code == "train-rank-lost" and "tenon resume" in error.value.hint
    assert time.monotonic() - killed < 40
    _, alive = psutil.wait_procs(ranks, timeout=15)
    assert not alive
    if lost:
        assert [event["code"] for event in events_of(run, "failed")] == ["train-rank-lost"]
    assert complete(world, run) == outcome(two)


def test_ranks_do_not_outlive_who_started_them(world: World) -> None:
    run = plan_run(world, "orphans", 2)
    training = start(world, run)
    wait_for_step(run, 3)
    ranks = ranks_of(training)
    os.kill(training.worker.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(ranks, timeout=20)
    assert not alive


def test_an_error_on_every_rank_is_told_once(world: World) -> None:
    run = plan_run(world, "broken", 2)
    plan = json.loads((run / "plan.json").read_text())
    plan["slots"][0]["lora"]["start_from"] = str(world.root / "nowhere")
    (run / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(AdapterError, match="nowhere") as error:
        start(world, run).finish()
    assert [event["code"] for event in events_of(run, "failed")] == [error.value.code]
