"""Measuring processes: their result, why they failed, their time."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.processes import OUT_OF_TIME, Budget, find_result, reason, run
from benchmarks.gpu.step import parse


def started(tmp_path: Path, code: str, timeout: float | None = 60):
    """A Python process with this code."""
    command = [sys.executable, "-c", code]
    return run(command, environment=os.environ, folder=tmp_path, log=tmp_path / "log", timeout=timeout)


def test_the_last_result_line_counts(tmp_path: Path) -> None:
    outcome = started(tmp_path, "print('RESULT {\"a\": 1}'); print('noise'); print('RESULT {\"a\": 2}')")
    assert (outcome.result, outcome.failed) == ({"a": 2}, "")
    assert outcome.wall_s > 0 and "noise" in (tmp_path / "log").read_text()
    assert find_result("nothing") is None


def test_failures_are_named(tmp_path: Path) -> None:
    assert started(tmp_path, "raise ValueError('no such base')").failed == "status 1: ValueError: no such base"
    assert started(tmp_path, "pass").failed == "status 0: no output"
    late = started(tmp_path, "import time; print('begun', flush=True); time.sleep(60)", timeout=1)
    assert late.failed == OUT_OF_TIME and late.result is None and "begun" in (tmp_path / "log").read_text()
    assert reason("x\ntorch.OutOfMemoryError: CUDA out of memory. Tried\nmore", 1) == "out of memory"


def test_a_budget_runs_out() -> None:
    assert Budget(0).allows(1e9) and Budget(10).allows(5) and not Budget(10).allows(11)
    budget = Budget(10)
    budget.started -= 8
    assert budget.left == pytest.approx(2, abs=0.5) and not budget.allows(5)


def test_a_trial_may_not_overwrite_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--device", "cpu", "--shape", "tiny"])
    assert "--results" in capsys.readouterr().err
    assert parse(["--device", "cpu", "--results", "x.json"]).results == Path("x.json")
