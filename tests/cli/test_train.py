"""`tenon train` and `tenon resume` with the fake worker: views, statuses, stops, errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tenon.runs.folder import RunFolder
from tenon.runs.status import RunState, status
from tenon.settings import Settings, child_environment

from .conftest import Command, write_recipe


def only_run(workplace: Path) -> RunFolder:
    (folder,) = (workplace / "runs").iterdir()
    return RunFolder.open(folder)


def start(workplace: Path, settings: Settings, *words: str) -> subprocess.Popen[str]:
    """A command in a process of its own, without a terminal."""
    return subprocess.Popen(
        [sys.executable, "-m", "tenon.cli.main", *words],
        cwd=workplace,
        env=child_environment(settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_step(workplace: Path, step: int) -> RunFolder:
    """The only run, once it has done `step` steps."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        runs = list((workplace / "runs").glob("*/events.jsonl"))
        if runs and status(RunFolder.open(runs[0].parent)).step >= step:
            return RunFolder.open(runs[0].parent)
        time.sleep(0.02)
    raise AssertionError("the run never got that far")


def wait_for_state(run: RunFolder, state: RunState) -> None:
    deadline = time.monotonic() + 30
    while status(run).state is not state:
        assert time.monotonic() < deadline, f"still {status(run).state}"
        time.sleep(0.02)


def test_a_training_ends_with_before_and_after(tenon: Command, workplace: Path) -> None:
    done = tenon("train", "demo.yaml")
    assert done.status == 0
    assert "exact" in done.out and "10.0%" in done.out and "90.0%" in done.out
    assert "step 20/20 (100%)" in done.err
    assert "tenon chat demo" in done.err
    assert status(only_run(workplace)).state is RunState.FINISHED


def test_p32_a_training_ends_with_plan_against_actual(tenon: Command) -> None:
    done = tenon("train", "demo.yaml")
    head, time_line, memory, tokens = (line.split() for line in done.err.partition("planned")[2].splitlines()[:4])
    assert head == ["actual"]
    assert time_line[0] == "time" and time_line[-1] in ("s", "ms")
    assert memory[0] == "memory" and memory[-2:] == ["1.2", "GB"]
    assert tokens[0] == "tokens" and tokens[-1] == "210,000"


def test_quiet_says_no_progress(tenon: Command) -> None:
    done = tenon("train", "demo.yaml", "--quiet")
    assert done.status == 0
    assert "step " not in done.err and "90.0%" in done.out


def test_json_gives_every_event_and_nothing_else(tenon: Command) -> None:
    done = tenon("train", "demo.yaml", "--json")
    events = [json.loads(line) for line in done.out.splitlines()]
    kinds = [event["kind"] for event in events]
    assert kinds[0] == "start" and kinds[-1] == "finished" and kinds.count("step") == 20
    assert done.err == ""


def test_several_recipes_are_one_run(tenon: Command, workplace: Path) -> None:
    write_recipe(workplace, "other")
    done = tenon("train", "demo.yaml", "other.yaml", "--json", "lora.rank=4")
    slots = {event["slot"] for event in map(json.loads, done.out.splitlines()) if event["kind"] == "step"}
    assert slots == {"demo", "other"}
    assert sorted(only_run(workplace).recipe_texts()) == ["recipe-demo.yaml", "recipe-other.yaml"]
    assert "# lora.rank=4\n" in only_run(workplace).recipe_texts()["recipe-demo.yaml"]


def test_training_again_takes_a_folder_of_its_own(tenon: Command, workplace: Path) -> None:
    assert tenon("train", "demo.yaml", "-q").status == 0
    assert tenon("train", "demo.yaml", "-q").status == 0
    assert len(list((workplace / "runs").iterdir())) == 2


def test_an_error_of_the_worker_is_the_command_s_error(tenon: Command, workplace: Path) -> None:
    write_recipe(workplace, "fails-early")
    done = tenon("train", "fails-early.yaml")
    assert done.status == 1
    assert "error[train-not-finite]: step 3: the loss is not finite" in done.err
    assert "got:  nan" in done.err and "hint: lower optimizer.lr" in done.err
    assert "Traceback" not in done.err
    assert status(only_run(workplace)).state is RunState.FAILED


def test_p27_a_fault_of_the_worker_is_one_message_and_a_log(tenon: Command, workplace: Path) -> None:
    write_recipe(workplace, "crashes-early")
    done = tenon("train", "crashes-early.yaml")
    log = only_run(workplace).path / "worker.log"
    assert done.status == 1
    assert "error[run-worker-failed]" in done.err and "RuntimeError: a fault of the fake worker" in done.err
    assert log.name in done.err and "Traceback" not in done.err
    assert "Traceback" in log.read_text()


def test_a_gpu_that_is_lost_is_one_error_even_when_the_worker_hangs(tenon: Command, workplace: Path) -> None:
    """The worker can only leave it in the run's events; the run stays, to be resumed."""
    write_recipe(workplace, "loses-gpu")
    done = tenon("train", "loses-gpu.yaml")
    assert done.status == 1
    assert "error[train-gpu-lost]: the GPU is gone" in done.err and "tenon resume" in done.err
    assert "Traceback" not in done.err and "run-worker-failed" not in done.err
    assert status(only_run(workplace)).state is RunState.FAILED


def test_p24_ctrl_c_saves_and_exits_75(workplace: Path, fake_settings: Settings) -> None:
    write_recipe(workplace, "slow-run", steps=500)
    process = start(workplace, fake_settings, "train", "slow-run.yaml")
    run = wait_for_step(workplace, 2)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 75, err
    assert "stopped[run-stopped]" in err and f"tenon resume {run.path}" in err
    assert out == ""
    now = status(run)
    assert now.state is RunState.STOPPED and now.checkpoint_step == now.step


def test_p24_sigterm_is_passed_on(workplace: Path, fake_settings: Settings) -> None:
    write_recipe(workplace, "slow-run", steps=500)
    process = start(workplace, fake_settings, "train", "slow-run.yaml", "--json")
    run = wait_for_step(workplace, 2)
    os.kill(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75, err
    assert status(run).state is RunState.STOPPED


def test_a_second_ctrl_c_ends_at_once(workplace: Path, fake_settings: Settings) -> None:
    write_recipe(workplace, "slow-deaf", steps=500)
    process = start(workplace, fake_settings, "train", "slow-deaf.yaml")
    run = wait_for_step(workplace, 2)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75, err
    assert status(run).state in (RunState.DEAD, RunState.STOPPED)


def test_a_worker_does_not_outlive_its_command(workplace: Path, fake_settings: Settings) -> None:
    write_recipe(workplace, "slow-run", steps=500)
    process = start(workplace, fake_settings, "train", "slow-run.yaml")
    run = wait_for_step(workplace, 2)
    process.kill()
    process.communicate(timeout=30)
    wait_for_state(run, RunState.STOPPED)


def test_a_detached_worker_goes_on(workplace: Path, fake_settings: Settings) -> None:
    write_recipe(workplace, "slow-run", steps=12)
    process = start(workplace, fake_settings, "train", "slow-run.yaml", "--detach")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0 and "tenon show" in err
    wait_for_state(wait_for_step(workplace, 0), RunState.FINISHED)


def test_resume_goes_on_where_it_stopped(workplace: Path, fake_settings: Settings, tenon: Command) -> None:
    write_recipe(workplace, "slow-run", steps=24)
    process = start(workplace, fake_settings, "train", "slow-run.yaml")
    run = wait_for_step(workplace, 2)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    stopped = status(run).step
    done = tenon("resume", "latest", "--json")
    events = [json.loads(line) for line in done.out.splitlines()]
    assert done.status == 0
    assert events[0]["kind"] == "resume" and events[0]["step"] == stopped
    assert [event["step"] for event in events if event["kind"] == "step"] == list(range(stopped + 1, 25))


def test_a_finished_run_is_not_resumed(tenon: Command) -> None:
    tenon("train", "demo.yaml", "-q")
    done = tenon("resume", "latest")
    assert done.status == 1 and "error[run-finished]" in done.err


def test_a_run_in_use_is_refused(tenon: Command, workplace: Path) -> None:
    tenon("train", "demo.yaml", "-q")
    run = only_run(workplace)
    run.events.emit("resume", step=0)
    with run.lock():
        done = tenon("resume", str(run.path))
    assert done.status == 1 and "error[run-busy]" in done.err


def test_show_says_how_memory_is_used(tenon: Command, workplace: Path) -> None:
    write_recipe(workplace, "demo")
    tenon("train", "demo.yaml", "-q")
    (folder,) = (workplace / "runs").iterdir()
    assert json.loads(tenon("show", "demo", "--json").out)["memory"] == ""
    events = RunFolder.open(folder).events
    events.emit("memory", text="keeps everything, computes nothing twice; 8,192 tokens at once", step=None)
    events.emit("memory", text="32 layers computed again; 8,192 tokens at once", step=7)
    assert "  memory: 32 layers computed again; 8,192 tokens at once" in tenon("show", "demo").out
    assert "keeps everything" not in tenon("show", "demo").out
