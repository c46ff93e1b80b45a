"""The run folder: its layout, its lock, its names, and the state that its files tell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from tenon.errors import RunError
from tenon.runs.events import read_events
from tenon.runs.folder import RunFolder
from tenon.runs.lock import hold, holder_of
from tenon.runs.naming import default_run_folder, find_run, list_runs
from tenon.runs.results import Metric, Result
from tenon.runs.status import RunState, status

PLAN = json.dumps({"checkpoint": {"every": 10, "keep": 3}})
HOLDS = """
import sys, time
from pathlib import Path
from tenon.runs.folder import RunFolder

run = RunFolder.open(Path(sys.argv[1]))
with run.lock():
    run.events.emit("start")
    print("held", flush=True)
    time.sleep(60)
"""
ASKS = """
import sys
from pathlib import Path
from tenon.runs.lock import holder_of

print("asking", flush=True)
while True:
    holder_of(Path(sys.argv[1]))
"""


def _create(path: Path) -> RunFolder:
    return RunFolder.create(path, plan_json=PLAN, recipe_text="base: tiny\n")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return _create(tmp_path / "run")


def _fill(folder: Path) -> None:
    (folder / "file").write_bytes(b"whole")


def _code(error: pytest.ExceptionInfo[RunError]) -> str:
    assert error.value.hint
    return error.value.code


def test_a_new_run_holds_its_plan_and_its_recipe_as_given(run: RunFolder) -> None:
    opened = RunFolder.open(run.path)
    assert opened.plan_json() == PLAN
    assert opened.recipe_texts() == {"recipe.yaml": "base: tiny\n"}
    assert opened.checkpoints.keep == 3
    assert opened.data_report() is None
    assert opened.name == "run"


def test_a_run_of_several_slots_keeps_each_recipe(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", plan_json="{}", recipe_text={"a": "one", "b": "two"})
    assert run.recipe_texts() == {"recipe-a.yaml": "one", "recipe-b.yaml": "two"}
    assert run.checkpoints.keep == 2


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunError) as caught:
        _create(tmp_path)
    assert _code(caught) == "run-folder-not-empty"
    assert "thesis.tex" in caught.value.got
    assert not (tmp_path / "plan.json").exists()
    with pytest.raises(RunError) as caught:
        _create(_create(tmp_path / "run").path)
    assert _code(caught) == "run-folder-not-empty"


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError) as caught:
        _create(tmp_path / "file" / "run")
    assert _code(caught) == "run-not-writable"


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        RunFolder.open(tmp_path / "nowhere")
    assert _code(caught) == "run-missing"
    with pytest.raises(RunError) as caught:
        RunFolder.open(tmp_path)
    assert _code(caught) == "run-not-a-run"


def test_a_damaged_plan_is_named(run: RunFolder) -> None:
    (run.path / "plan.json").write_text("{")
    with pytest.raises(RunError) as caught:
        _ = RunFolder.open(run.path).checkpoints
    assert _code(caught) == "run-damaged"


def test_results_come_back_equal(run: RunFolder) -> None:
    result = Result(
        subject="base",
        base_hash="b",
        adapter_hash=None,
        data_hash="d",
        template_hash="t",
        task="text",
        metrics=(Metric(name="loss", value=1.0, low=0.5, high=1.5),),
        examples=(),
    )
    run.write_result("base", result)
    assert run.read_result("base") == result
    assert run.result_names() == ("base",)
    with pytest.raises(RunError) as caught:
        run.read_result("adapter")
    assert _code(caught) == "run-no-result"
    assert caught.value.got == "base"
    (run.path / "results" / "old.json").write_text("{}")
    with pytest.raises(RunError) as caught:
        run.read_result("old")
    assert _code(caught) == "run-damaged"


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "/etc/passwd", "a\nb", "x" * 101])
def test_p35_names_that_lead_out_of_the_run_are_refused(run: RunFolder, name: str) -> None:
    with pytest.raises(RunError) as caught:
        run.adapter_folder(name)
    assert _code(caught) == "run-bad-name"


def test_the_data_report_and_adapter_folders_have_their_places(run: RunFolder) -> None:
    run.write_data_report('{"rows": 3}')
    assert run.data_report() == '{"rows": 3}'
    assert run.adapter_folder("a") == run.path / "adapter" / "a"


def test_p22_a_damaged_checkpoint_becomes_a_warning_event_that_names_it(run: RunFolder) -> None:
    for step in (1, 2):
        run.checkpoints.write(step, _fill)
    (run.path / "checkpoints" / "step-00000002" / "file").write_bytes(b"torn!")
    newest = run.checkpoints.newest()
    assert newest is not None
    assert newest.step == 1
    (warning,) = read_events(run.path / "events.jsonl")
    assert (warning["kind"], warning["code"]) == ("warning", "run-checkpoint-damaged")
    assert warning["text"] == (
        "checkpoint step-00000002 is damaged and was passed over: file does not hold what was written"
    )


def test_a_run_in_use_by_another_process_is_busy_until_that_process_is_killed(run: RunFolder) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(run.path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError) as caught, hold(run.path / "lock", patience_seconds=0.1):
            pass
        assert _code(caught) == "run-busy"
        assert f"process {other.pid} on " in caught.value.what
        now = status(run)
        assert (now.state, now.pid) == (RunState.RUNNING, other.pid)
        other.kill()
        other.wait()
    assert status(run).state is RunState.DEAD
    # What the file says is stale, and that is no problem.
    assert str(other.pid) in (run.path / "lock").read_text()
    with run.lock() as holder:
        assert holder.pid == os.getpid()


def test_asking_for_the_holder_never_makes_a_run_busy(run: RunFolder) -> None:
    asking = subprocess.Popen([sys.executable, "-c", ASKS, str(run.path / "lock")], stdout=subprocess.PIPE, text=True)
    assert asking.stdout is not None
    assert asking.stdout.readline() == "asking\n"
    try:
        for _ in range(20):
            with run.lock():
                pass
    finally:
        asking.kill()
        asking.communicate()


def test_leftovers_of_a_killed_writer_are_gone_once_the_run_is_locked(run: RunFolder) -> None:
    for folder in ("", "checkpoints", "results", "adapter"):
        (run.path / folder).mkdir(exist_ok=True)
        (run.path / folder / ".aside-0123456789ab-file").write_bytes(b"half")
    with run.lock():
        assert not list(run.path.rglob(".aside-*"))


@pytest.mark.parametrize(
    ("kinds", "state"),
    [
        ((), RunState.PLANNED),
        (("warning",), RunState.PLANNED),
        (("start", "step"), RunState.DEAD),
        (("start", "step", "stopped"), RunState.STOPPED),
        (("start", "stopped", "resume", "step"), RunState.DEAD),
        (("start", "step", "failed"), RunState.FAILED),
        (("start", "failed", "resume", "finished"), RunState.FINISHED),
    ],
)
def test_the_state_follows_from_the_events_when_nobody_holds_the_lock(
    run: RunFolder, kinds: tuple[str, ...], state: RunState
) -> None:
    for kind in kinds:
        run.events.emit(kind, code="train-nan", text="a loss is not a number")
    now = status(run)
    assert now.state is state
    assert now.reason == ("train-nan: a loss is not a number" if state is RunState.FAILED else "")
    assert now.warnings == kinds.count("warning")
    assert now.pid is None


def test_the_state_while_the_lock_is_held(run: RunFolder) -> None:
    with run.lock():
        assert status(run).state is RunState.RUNNING  # preparing, nothing logged yet
        run.events.emit("start")
        assert status(run).state is RunState.RUNNING
        run.events.emit("stopped", step=3)
        assert status(run).state is RunState.STOPPED  # the worker is only just leaving
    with run.lock():
        assert status(run).state is RunState.RUNNING  # loading, before it says `resume`


def test_the_status_tells_steps_and_checkpoints(run: RunFolder) -> None:
    run.events.emit("start")
    for step in (1, 2, 3):
        run.events.emit("step", slot="a", step=step)
    run.events.emit("step", slot="b", step=2)
    assert status(run).step == 3
    run.checkpoints.write(2, lambda folder: (folder / "file").touch())
    run.checkpoints.mark_best(2, "a")
    run.events.emit("resume", step=2)
    now = status(run)
    assert (now.step, now.checkpoint_step, now.best_steps) == (2, 2, {"a": 2})
    run.events.emit("start")
    assert status(run).step == 0
    assert now.started is not None
    assert now.updated is not None
    assert now.started <= now.updated


def test_a_default_name_is_free_and_plain(tmp_path: Path) -> None:
    now = datetime(2026, 11, 22, 14, 25, 30)
    first = default_run_folder("my recipe/été", tmp_path, now=now)
    assert first == tmp_path / "my-recipe-t-20261122-142530"
    _create(first)
    assert default_run_folder("my recipe/été", tmp_path, now=now).name == "my-recipe-t-20261122-142530-2"
    assert default_run_folder("..", tmp_path, now=now).name == "run-20261122-142530"


def test_runs_are_found_by_what_users_type(tmp_path: Path) -> None:
    runs = [_create(tmp_path / name) for name in ("intents-1", "intents-2", "poems")]
    for seconds, run in enumerate(runs):
        os.utime(run.path / "plan.json", (seconds, seconds))
    (tmp_path / "no-run").mkdir()
    assert [run.name for run in list_runs(tmp_path)] == ["poems", "intents-2", "intents-1"]
    assert find_run("latest", tmp_path).name == "poems"
    assert find_run("po", tmp_path).name == "poems"
    assert find_run("intents-1", tmp_path).name == "intents-1"
    assert find_run(str(tmp_path / "poems"), tmp_path / "elsewhere").name == "poems"
    for spec, code in {
        "intents": "run-ambiguous",
        "peoms": "run-unknown",
        "no-run": "run-unknown",
        "": "run-unknown",
        str(tmp_path / "gone"): "run-missing",
        str(tmp_path / "no-run"): "run-not-a-run",
    }.items():
        with pytest.raises(RunError) as caught:
            find_run(spec, tmp_path)
        assert _code(caught) == code
    with pytest.raises(RunError) as caught:
        find_run("peoms", tmp_path)
    assert "did you mean poems?" in caught.value.hint
    with pytest.raises(RunError) as caught:
        find_run("latest", tmp_path / "empty")
    assert _code(caught) == "run-unknown"


def test_nobody_holds_a_lock_that_does_not_exist(tmp_path: Path) -> None:
    assert holder_of(tmp_path / "lock") is None
