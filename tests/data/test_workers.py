"""Worker processes: results, errors, lost children, and none left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tenon.data.workers import WorkerPool, WorkerProcess, run_tasks
from tenon.errors import DataError
from tests.conftest import REPOSITORY
from tests.data.tasks import DieInWorkers, DieOnce, Imports, Refuse, Sleep, Square


def _gone(pids: tuple[int, ...], *, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
            return True
        time.sleep(0.02)
    return False


def test_results_come_in_order_from_several_processes() -> None:
    counts: list[int] = []
    results = run_tasks([Square(number) for number in range(20)], workers=2, on_done=counts.append)
    assert [square for square, _ in results] == [number**2 for number in range(20)]
    assert os.getpid() not in {pid for _, pid in results}
    assert counts == list(range(1, 21))


def test_one_worker_means_this_process() -> None:
    assert run_tasks([Square(3), Square(4)], workers=1) == [(9, os.getpid()), (16, os.getpid())]


def test_an_error_of_a_task_is_raised_here_as_it_was() -> None:
    with pytest.raises(DataError) as caught:
        run_tasks([Refuse(), Refuse()], workers=2)
    assert (caught.value.code, caught.value.hint) == ("data-row-empty", "fill it")


def test_a_lost_worker_costs_nothing_but_time(tmp_path: Path) -> None:
    assert run_tasks([DieOnce(tmp_path / "a"), DieOnce(tmp_path / "b")], workers=2) == ["done", "done"]


def test_when_workers_keep_dying_the_work_is_done_here() -> None:
    assert run_tasks([DieInWorkers(os.getpid())] * 3, workers=2) == ["done at home"] * 3


def test_closing_ends_busy_workers_at_once() -> None:
    pool = WorkerPool([Sleep(60), Sleep(60)], workers=2, nice=0, on_result=lambda index, result: None)
    pool.start()
    end = time.monotonic() + 10
    while len(pool.pids) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    pids = pool.pids
    assert len(pids) == 2
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 5
    assert _gone(pids)


def test_workers_import_nothing_heavy() -> None:
    worker = WorkerProcess(nice=0)
    try:
        assert worker.call(Imports()) == []
    finally:
        worker.close()


def test_ctrl_c_does_not_reach_workers() -> None:
    worker = WorkerProcess(nice=5)
    try:
        assert worker.call(Square(2))[0] == 4
        os.kill(worker.pid, signal.SIGINT)
        assert worker.call(Square(3))[0] == 9
        assert psutil.Process(worker.pid).nice() >= 5
    finally:
        worker.close()


PARENT = """
import sys, time
from tenon.data.workers import WorkerPool
from tests.data.tasks import Sleep
pool = WorkerPool([Sleep(0.2)] * 1000, workers=2, nice=0, on_result=lambda index, result: None)
pool.start()
while len(pool.pids) < 2:
    time.sleep(0.01)
print(*pool.pids, flush=True)
time.sleep(60)
"""


def test_workers_end_when_the_parent_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = tuple(int(word) for word in parent.stdout.readline().split())
    assert len(pids) == 2
    assert all(psutil.pid_exists(pid) for pid in pids)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert _gone(pids)
