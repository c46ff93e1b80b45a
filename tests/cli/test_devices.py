"""Runs of several processes through the real commands and torchrun, with the fake worker: the first rank works."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from tenon.processes import Worker
from tenon.runs.status import RunState, status
from tenon.settings import Settings, read_settings

from .conftest import Command, write_recipe
from .test_train import only_run, start, wait_for_step


def test_a_training_on_two_devices_says_so_and_ends(tenon: Command, workplace: Path) -> None:
    done = tenon("train", "demo.yaml", "devices=2")
    assert done.status == 0, done.err
    assert "2 x cpu, a replica each" in done.err
    assert "step 20/20 (100%)" in done.err
    assert status(only_run(workplace)).state is RunState.FINISHED


def test_an_error_comes_through_torchrun_as_itself(tenon: Command, workplace: Path) -> None:
    write_recipe(workplace, "fails")
    done = tenon("train", "fails.yaml", "devices=2", "--quiet")
    assert done.status == 1
    assert "error[train-not-finite]" in done.err


def test_resume_goes_on_with_another_number(workplace: Path, fake_settings: Settings, tenon: Command) -> None:
    write_recipe(workplace, "slow")
    command = start(workplace, fake_settings, "train", "slow.yaml", "--quiet")
    run = wait_for_step(workplace, 2)
    command.send_signal(signal.SIGINT)
    command.communicate(timeout=60)
    assert tenon("resume", "latest", "--devices", "0").status == 2
    done = tenon("resume", "latest", "--json", "--devices", "2")
    assert done.status == 0, done.err
    assert json.loads(done.out.splitlines()[0])["kind"] == "resume"
    assert "torch/distributed" not in done.err
    assert status(run).state is RunState.FINISHED


def told(*codes: str) -> Worker:
    """A worker whose processes told these errors, in this order."""
    lines = "\n".join(json.dumps({"kind": "error", "code": code, "what": "w", "hint": "h"}) for code in codes)
    process = subprocess.Popen(
        [sys.executable, "-c", f"print({lines!r})"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    return Worker(process, Path("worker.log"))


def test_of_several_errors_the_cause_is_told() -> None:
    for codes, cause in (
        (("run-busy", "run-stopped"), "run-busy"),
        (("train-rank-lost", "data-row-broken"), "data-row-broken"),
        (("data-row-broken", "train-rank-lost"), "data-row-broken"),
    ):
        worker = told(*codes)
        assert list(worker.events()) == []
        assert worker.error is not None and worker.error.code == cause
        worker.kill()


def test_ranks_are_those_of_torchrun_alone() -> None:
    launched = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "29400"}
    settings = read_settings({**launched, "TORCHELASTIC_RUN_ID": "none"})
    assert (settings.rank, settings.ranks, settings.rendezvous) == (1, 4, "localhost:29400")
    settings = read_settings(launched)
    assert (settings.rank, settings.ranks, settings.rendezvous) == (0, 1, "")
