"""A run that is killed, stopped or out of space, and resumed, is bit for bit the run that never was."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from pathlib import Path

import pytest

from benchmarks.survival import Outcome, finish, kill_at_random, longest_life, outcome
from tenon.errors import EXIT_RESUME
from tests.journeys.world import World, make_world

OVERRIDES = ("limits.epochs=12", "checkpoint.every=4")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("survival"))


@pytest.fixture(scope="module")
def calm(world: World) -> tuple[Outcome, float]:
    """The run that is never disturbed, and how long it takes."""
    run = world.plan_run(world.root / "runs" / "calm", *OVERRIDES)
    seconds = finish(world, run)
    found = outcome(run)
    assert len(found.losses) > 100
    return found, seconds


def test_p21_sigkill_at_random_instants(world: World, calm: tuple[Outcome, float]) -> None:
    """Five kills here; benchmarks/spine_survival.py does twenty-five."""
    run = world.plan_run(world.root / "runs" / "killed", *OVERRIDES)
    life_seconds = longest_life(world.root / "runs" / "calm", calm[1], kills=5)
    kill_at_random(world, run, kills=5, life_seconds=life_seconds, seed=1)
    assert outcome(run) == calm[0]


def wait_for_step(run: Path, step: int, *, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        lines = (run / "events.jsonl").read_text().splitlines() if (run / "events.jsonl").exists() else []
        if any(f'"step": {step},' in line and '"kind": "step"' in line for line in lines):
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} never came")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_p24_a_stop_saves_says_so_and_resumes_exactly(
    world: World, calm: tuple[Outcome, float], number: signal.Signals
) -> None:
    run = world.plan_run(world.root / "runs" / f"stopped-{number.name}", *OVERRIDES)
    worker = world.start_worker(run)
    wait_for_step(run, 30)
    sent = time.monotonic()
    os.killpg(worker.pid, number)
    output, _ = worker.communicate(timeout=30)
    assert worker.returncode == EXIT_RESUME, output
    assert time.monotonic() - sent < 10
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert events[-1]["kind"] == "stopped"
    # Nothing that was done is lost: the checkpoint is of the last step.
    assert (run / "checkpoints" / f"step-{events[-1]['step']:08d}").is_dir()
    finish(world, run)
    assert outcome(run) == calm[0]


def test_p23_a_full_disk_loses_no_earlier_checkpoint(world: World, calm: tuple[Outcome, float]) -> None:
    """Files may not grow beyond a size that the optimiser's state exceeds: the first checkpoint cannot be written."""
    run = world.plan_run(world.root / "runs" / "full", *OVERRIDES)
    worker = world.start_worker(run)
    wait_for_step(run, 10)
    resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    output, _ = worker.communicate(timeout=60)
    assert worker.returncode == 1
    assert b"run-disk-full" in output
    assert list((run / "checkpoints").glob("step-*"))
    finish(world, run)
    assert outcome(run) == calm[0]


def test_p22_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    world: World, calm: tuple[Outcome, float]
) -> None:
    run = world.plan_run(world.root / "runs" / "damaged", *OVERRIDES)
    worker = world.start_worker(run)
    wait_for_step(run, 20)
    os.killpg(worker.pid, signal.SIGKILL)
    worker.communicate()
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    tensors = newest / "echo" / "optimizer.safetensors"
    whole = bytearray(tensors.read_bytes())
    whole[-1] ^= 1
    tensors.write_bytes(whole)
    finish(world, run)
    assert newest.name in (run / "events.jsonl").read_text()
    assert outcome(run) == calm[0]


def test_a_run_in_use_is_refused(world: World) -> None:
    run = world.plan_run(world.root / "runs" / "busy", *OVERRIDES)
    worker = world.start_worker(run)
    wait_for_step(run, 1)
    second = world.tenon("resume", str(run))
    assert second.returncode == 1
    assert "run-busy" in second.stderr
    assert str(worker.pid) in second.stderr
    os.killpg(worker.pid, signal.SIGKILL)
    worker.communicate()
