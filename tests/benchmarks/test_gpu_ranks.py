"""The benchmark of two GPUs: its works, its figures, and a trial of its processes on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu_ranks
from benchmarks.gpu.ranks import QWEN_32B, TRIALS, WORKS, parse_work
from benchmarks.ours.contact import facts_of


@pytest.mark.parametrize("work", (*WORKS, *TRIALS), ids=lambda work: work.name)
def test_a_work_travels_as_json(work: gpu_ranks.RanksWork) -> None:
    assert parse_work(work.to_json()) == work


def test_the_32b_shape_is_qwens() -> None:
    facts = facts_of(QWEN_32B)
    assert facts.head_dim == 128
    assert 32.5e9 < facts.parameters < 33e9
    assert 62e9 < 2 * facts.linear_parameters < 63e9


def test_medians_of_turns_and_their_quotient_become_figures() -> None:
    work = WORKS[0]
    found = {"alone": [[2.0, 2.0], [1.0, 3.0], [9.0, 9.0]], "together": [[1.0, 1.0]], "peak_gb": 40.0, "gpus": 2}
    rows = gpu_ranks.rows_of(work, found)
    assert [row.value for row in rows] == [8192, 16384, 2.0, 40.0]
    assert (rows[2].bound, rows[2].met) == (">= 1.9", True)
    assert [row.met for row in rows].count(None) == 3


def test_a_trial_on_a_cpu_names_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_ranks.main(["--device", "cpu"])
    assert "--results" in capsys.readouterr().err


@pytest.mark.slow
def test_trials_on_a_cpu(tmp_path: Path) -> None:
    """Whole bases and a spread one take the same steps."""
    results = tmp_path / "ranks.json"
    assert gpu_ranks.main(["--device", "cpu", "--results", str(results)]) == 0
    found = json.loads(results.read_text())["repetitions"]
    assert found["tiny"]["loss"] == found["tiny-spread"]["loss"] == pytest.approx(4.57, abs=0.3)
    assert found["tiny"]["gpus"] == 2
