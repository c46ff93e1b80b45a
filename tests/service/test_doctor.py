"""The doctor over worker processes: every check has a result, whatever becomes of the worker that ran it."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from pathlib import Path

import pytest

from tenon.processes import Event
from tenon.service.doctor import DoctorReport, examine
from tenon.settings import Settings


def states(report: DoctorReport) -> dict[str, str]:
    return {f"{check.name} ({check.device})": check.state for check in report.checks}


def look(settings: Settings, *, check_seconds: float = 60.0) -> tuple[DoctorReport, list[Event]]:
    events: list[Event] = []
    return examine(settings, events.append, check_seconds=check_seconds), events


def test_every_check_of_the_fake_worker(settings: Settings) -> None:
    report, events = look(dataclasses.replace(settings, worker="tenon.worker.fake"))
    assert states(report) == {"sum (cpu)": "works", "product (cpu)": "fails", "sum (cuda)": "absent"}
    assert report.machine.system == "Fake" and report.loopback.problem == ""
    assert report.hub is None  # offline
    assert report.checks[1].text == "RuntimeError: no product" and report.checks[1].instead == "plain"
    assert [event["kind"] for event in events].count("progress") == 3
    assert not report.blocked
    assert list((settings.home / "logs").iterdir()) == []


def test_the_real_worker_tries_out_this_machine(settings: Settings) -> None:
    report, _ = look(settings, check_seconds=300.0)
    found = states(report)
    assert found["attention math (cpu)"] == found["matmul bf16 (cpu)"] == "works"
    assert len(found) >= 13
    assert report.machine.packages["torch"]
    assert DoctorReport.from_json(report.to_json()) == report


WORKER = """
import os, sys, time
from tenon.worker.fake import FakePipeline
from tenon.worker.loop import work

class Trouble(FakePipeline):
    def check_kernels(self, request, emit, settings, /):
        for key in ("one", "bad", "two"):
            if key in request.done:
                continue
            fields = dict(device="cpu", bound=0.1, instead="plain")
            emit("progress", what=key, done=0, total=3, key=key, **fields)
            if key == "bad":
                {trouble}
            emit("check", key=key, name=key, state="works", error=0.0, text="", seconds=0.0, **fields)
        emit("finished")

if __name__ == "__main__":
    sys.exit(work(sys.argv[1:], Trouble))
"""


@pytest.fixture
def troubled(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Settings:
    """Settings with a worker whose second check makes trouble, as the test's parameter says."""
    name = f"troubled_worker_{abs(hash(request.param))}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(WORKER).replace("{trouble}", request.param))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return dataclasses.replace(settings, worker=name)


@pytest.mark.parametrize(
    "troubled", ["os.kill(os.getpid(), 11)", "os._exit(3)", "raise ValueError('odd')"], indirect=True
)
def test_a_kernel_that_ends_its_worker_is_one_failed_check(troubled: Settings) -> None:
    report, _ = look(troubled)
    assert states(report) == {"one (cpu)": "works", "bad (cpu)": "fails", "two (cpu)": "works"}
    (bad,) = [check for check in report.checks if check.state == "fails"]
    assert "ended unexpectedly" in bad.text and bad.instead == "plain" and bad.bound == 0.1


@pytest.mark.parametrize("troubled", ["time.sleep(600)"], indirect=True)
def test_a_kernel_that_never_returns_is_one_failed_check(troubled: Settings) -> None:
    report, _ = look(troubled, check_seconds=3.0)
    assert states(report) == {"one (cpu)": "works", "bad (cpu)": "fails", "two (cpu)": "works"}
    assert any("did not return within 3 s" in check.text for check in report.checks)


@pytest.mark.parametrize(
    "troubled",
    ["emit('check', key=key, name=key, state='fails', error=None, text='x', seconds=0.0, **fields); return"],
    indirect=True,
)
def test_a_kernel_that_takes_the_gpu_with_it_is_one_failed_check(troubled: Settings) -> None:
    """The worker ends early, in good order: the next one does the rest."""
    report, _ = look(troubled)
    assert states(report) == {"one (cpu)": "works", "bad (cpu)": "fails", "two (cpu)": "works"}


def test_a_worker_that_cannot_start_is_advice_not_a_traceback(settings: Settings) -> None:
    report, _ = look(dataclasses.replace(settings, worker="tenon.worker.absent"))
    assert report.checks == () and report.blocked
    assert "No module named" in report.advice[0].what
    assert report.machine.packages["torch"] and sys.version.startswith(report.machine.python)
