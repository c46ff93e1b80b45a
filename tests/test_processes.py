"""Starting workers and listening to them: errors come back as themselves, nothing is left running."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import pytest

from tenon.errors import (
    AdapterError,
    BaseModelError,
    DataError,
    PlanError,
    RecipeError,
    RunError,
    StopRequestedError,
    TenonError,
    TrainError,
    UsageError,
)  # fmt: skip
from tenon.plan.requests import GenerateRequest, Prompt, Sampling
from tenon.processes import ask_worker, revive_error, start_worker
from tenon.settings import Settings, child_environment, read_settings
from tests.worker.test_loop import BASE, ENGINE

KINDS = [
    RecipeError, PlanError, BaseModelError, DataError, AdapterError, RunError, TrainError, UsageError,
]  # fmt: skip
PREFIXES = ["recipe", "plan", "base", "data", "adapter", "run", "train", "usage"]


@pytest.fixture
def fake_settings(settings: Settings) -> Settings:
    return dataclasses.replace(settings, worker="tenon.worker.fake")


def request(*texts: str) -> GenerateRequest:
    prompts = tuple(Prompt(source="x", messages=({"role": "user", "content": text},)) for text in texts)
    return GenerateRequest(engine=ENGINE, subject=BASE, prompts=prompts, sampling=Sampling())


@pytest.mark.parametrize(("prefix", "kind"), list(zip(PREFIXES, KINDS, strict=True)))
def test_an_error_comes_back_as_itself(prefix: str, kind: type[TenonError]) -> None:
    event = {"kind": "error", "code": f"{prefix}-x", "what": "w", "got": "g", "hint": "h"}
    error = revive_error(event)
    assert type(error) is kind
    assert (error.code, error.what, error.got, error.hint) == (f"{prefix}-x", "w", "g", "h")


@pytest.mark.parametrize("code", ["run-stopped", "train-stopped", "usage-answer-stopped"])
def test_a_stop_comes_back_as_a_stop(code: str) -> None:
    assert type(revive_error({"code": code, "what": "w", "hint": "h"})) is StopRequestedError


def test_a_request_is_answered_and_leaves_no_log(fake_settings: Settings) -> None:
    events = list(ask_worker("generate", request("a", "b"), settings=fake_settings))
    assert sorted(event["text"] for event in events) == ["base heard: a", "base heard: b"]
    assert list((fake_settings.home / "logs").iterdir()) == []


def test_a_worker_that_cannot_start_says_why_in_its_log(settings: Settings) -> None:
    broken = dataclasses.replace(settings, worker="tenon.worker.absent")
    with pytest.raises(RunError) as error:
        list(ask_worker("generate", request("a"), settings=broken))
    assert error.value.code == "run-worker-failed" and "No module named" in error.value.got
    (log,) = (settings.home / "logs").iterdir()
    assert str(log) in error.value.hint


def test_leaving_early_ends_the_worker(fake_settings: Settings) -> None:
    answers = ask_worker("generate", request(*"abcdef"), settings=fake_settings)
    next(answers)
    answers.close()
    (log,) = (fake_settings.home / "logs").iterdir()
    assert log.read_text() == ""


def test_a_killed_worker_is_named(fake_settings: Settings, tmp_path: Path) -> None:
    worker = start_worker("chat", None, settings=fake_settings, log=tmp_path / "log")
    os.kill(worker.pid, 9)
    with pytest.raises(RunError) as error:
        worker.finish()
    assert error.value.code == "run-worker-killed" and "memory" in error.value.what


def test_a_second_stop_kills(fake_settings: Settings, tmp_path: Path) -> None:
    worker = start_worker("chat", None, settings=fake_settings, log=tmp_path / "log")
    worker.stop()
    worker.stop()
    with pytest.raises(StopRequestedError):
        worker.finish()
    assert not worker.running


def test_p24_work_that_has_not_begun_stops_at_once(fake_settings: Settings, tmp_path: Path) -> None:
    """A worker that still waits for its request, or still imports, has nothing to save."""
    worker = start_worker("generate", None, settings=fake_settings, log=tmp_path / "log")
    time.sleep(0.5)
    worker.stop()
    started = time.monotonic()
    with pytest.raises(StopRequestedError):
        worker.finish()
    assert time.monotonic() - started < 5


def test_a_worker_s_threads_do_not_spin_unless_the_user_says_so(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert child_environment(settings)["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert child_environment(settings)["OMP_WAIT_POLICY"] == "ACTIVE"


def test_a_gpus_memory_is_taken_in_segments_that_grow(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless somebody has said otherwise, by either of its names."""
    old, new = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
    for name in (old, new):
        monkeypatch.delenv(name, raising=False)
    assert child_environment(settings)[old] == "expandable_segments:True"
    monkeypatch.setenv(new, "backend:native")
    assert old not in child_environment(settings)
    monkeypatch.setenv(old, "backend:native")
    assert child_environment(settings)[old] == "backend:native"


def test_a_worker_has_the_settings_of_its_command(settings: Settings) -> None:
    told = dataclasses.replace(settings, threads=3, debug=True, worker="tenon.worker.fake")
    assert read_settings(child_environment(told)) == dataclasses.replace(
        told, visible_devices=read_settings().visible_devices
    )
