"""Large data: the first rows are there before the rest is tokenised, whatever the size; nothing is left behind."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from tenon.data.dataset import SMALL_ROWS, Dataset, open_dataset
from tenon.data.order import RowOrder
from tenon.plan.values import DataPlan
from tenon.settings import Settings
from tests.conftest import REPOSITORY
from tests.data.build import data_plan
from tests.data.chats import CHATML, save_byte_tokenizer

MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_tokenizer(tmp_path_factory.mktemp("base"), chat_template=CHATML)


@pytest.fixture(scope="module")
def large_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few more rows than are tokenised before training; two of them are longer than 64 tokens."""
    path = tmp_path_factory.mktemp("large") / "rows.jsonl"
    with path.open("w") as out:
        for number in range(SMALL_ROWS + 500):
            text = "long " * 80 if number in (3, 20_100) else f"row {number}"
            out.write(json.dumps({"text": text, "label": f"l{number % 9}"}) + "\n")
    return path


def _open(plan: DataPlan, base: Path, settings: Settings) -> Dataset:
    return open_dataset(plan, base_folder=base, settings=settings)


def _plan(path: Path, **changes: object) -> DataPlan:
    return data_plan(path, workers=2, **changes)


def test_p30_rows_are_there_before_the_rest_is_tokenised(large_file: Path, base: Path, settings: Settings) -> None:
    with _open(_plan(large_file), base, settings) as dataset:
        assert not dataset.report.complete
        assert not dataset.train.exact
        rows = [dataset.train.row(number) for number in (SMALL_ROWS, 0, 777)]
        assert all(row.supervised.any() for row in rows)
        assert len(dataset.train) == SMALL_ROWS + 500
    assert not any(psutil.pid_exists(pid) for pid in dataset.feeder.pids)


def test_p21_dropped_rows_do_not_depend_on_what_the_cache_holds(
    large_file: Path, base: Path, settings: Settings
) -> None:
    plan = _plan(large_file, max_tokens=200, on_long="drop")
    with _open(plan, base, settings) as first:
        before = [len(first.train.row(number).ids) for number in (2, 3, 4, 20_100)]
        end = time.monotonic() + 120
        while not first.train.measures().known.all() and time.monotonic() < end:
            first.check()
            time.sleep(0.05)
    with _open(plan, base, settings) as second:
        assert second.report.complete
        assert [(drop.code, drop.rows) for drop in second.report.drops] == [("data-row-too-long", 2)]
        assert len(second.train) == len(first.train)
        assert second.train.exact == first.train.exact
        assert [len(second.train.row(number).ids) for number in (2, 3, 4, 20_100)] == before
        assert (before[1], before[3]) == (0, 0)
        assert second.train.sizes == first.train.sizes
        assert second.content_hash == first.content_hash


OPEN_AND_HANG = """
import sys, time
from pathlib import Path
from tenon.data.dataset import open_dataset
from tenon.plan.values import DataPlan
from tenon.settings import read_settings
plan = DataPlan.from_json(sys.argv[1])
dataset = open_dataset(plan, base_folder=Path(sys.argv[2]), settings=read_settings({"TENON_HOME": sys.argv[3]}))
while len(dataset.feeder.pids) < 2:
    time.sleep(0.01)
print(*dataset.feeder.pids, flush=True)
time.sleep(60)
"""


def test_no_worker_outlives_a_killed_trainer(large_file: Path, base: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", OPEN_AND_HANG, _plan(large_file).to_json(), str(base), str(tmp_path)]
    trainer = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    pids = [int(word) for word in trainer.stdout.readline().split()]
    assert len(pids) == 2
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    end = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(psutil.pid_exists(pid) for pid in pids)


def _write_million(path: Path) -> None:
    words = [f"word{number}" for number in range(500)]
    draw = random.Random(0)
    system = "You route the questions of a bank's customers. Answer with the intent alone, and nothing else."
    with path.open("w") as out:
        for number in range(1_000_000):
            tree = {
                "messages": [
                    {"role": "system", "content": system},
                    {"role": "user", "content": f"{' '.join(draw.choices(words, k=12))} {number}"},
                    {"role": "assistant", "content": f"intent_{number % 77}"},
                ]
            }
            out.write(json.dumps(tree) + "\n")


def _cpu_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


@pytest.mark.slow
def test_p30_a_million_rows_give_their_first_step_within_seconds(
    tmp_path: Path, base: Path, settings: Settings, record_property: Callable[[str, object], None]
) -> None:
    path = tmp_path / "rows.jsonl"
    _write_million(path)
    assert path.stat().st_size > 280 * MEGABYTE
    me = psutil.Process(os.getpid())
    before_bytes = me.memory_info().rss
    started, spent = time.monotonic(), _cpu_seconds()
    with _open(_plan(path, heldout=0.0005), base, settings) as dataset:
        order = RowOrder(dataset.train.sizes, dataset.weights, seed=0, shuffle=True).epoch(0)
        rows = [dataset.train.row(int(number)) for number in order[:16]]
        seconds, cpu_seconds = time.monotonic() - started, _cpu_seconds() - spent
        for number in order[16:5_000]:
            dataset.train.row(int(number))
        here_bytes = me.memory_info().rss - before_bytes
        children_bytes = sum(child.memory_info().rss for child in me.children(recursive=True))
    assert len(rows) == 16
    assert len(np.unique(order)) == 999_500
    record_property("seconds", round(seconds, 1))
    record_property("cpu_seconds", round(cpu_seconds, 1))
    record_property("megabytes", (here_bytes + children_bytes) // MEGABYTE)
    # Processor time, since the machine may be busy with other things: two idle cores take about half of it.
    assert cpu_seconds < 20
    assert here_bytes + children_bytes < 1000 * MEGABYTE
