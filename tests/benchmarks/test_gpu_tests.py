"""The report of the GPU tests: counts, the worst error of each kernel, what falls short, what failed by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_tests import failed_tests, read_rows, run_tests

SAMPLE = """
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("error", [1e-3, 2e-3, float("nan")])
def test_kernel(error, record_property):
    record_property("error: project, bfloat16", f"{error:.4g} {2.5e-3:.4g}")
    record_property("error: whole step", f"{error:.4g}")
    assert error < 2.5e-3

@pytest.mark.gpu
def test_elsewhere():
    pytest.skip("no such kernel")

def test_on_a_cpu():
    raise AssertionError
"""


def test_counts_and_worst_errors(tmp_path: Path) -> None:
    """Tests without the mark do not run; NaN is worse than any number, and named with its bound."""
    (tmp_path / "test_sample.py").write_text(SAMPLE)
    (tmp_path / "test_broken.py").write_text("import a_package_that_nobody_has\n")
    report = tmp_path / "report.xml"
    status, seconds = run_tests([str(tmp_path)], [f"--rootdir={tmp_path}"], report, tmp_path / "log")
    rows = {row.what: row for row in read_rows(report, seconds)}
    assert status != 0 and seconds > 0 and "a_package_that_nobody_has" in (tmp_path / "log").read_text()
    counts = {name: rows[name].value for name in ("passed", "failed", "errors", "skipped")}
    assert counts == {"passed": 2, "failed": 1, "errors": 1, "skipped": 1}
    assert [rows[name].met for name in counts] == [True, False, False, None]
    assert failed_tests(report) == ["test_broken.py", "test_sample.py::test_kernel[nan]"]
    kernel = rows["project, bfloat16"]
    assert kernel.value != kernel.value and (kernel.bound, kernel.met) == ("<= 0.0025", False)
    assert rows["whole step"].bound is None


def test_the_error_nearest_to_its_bound_is_kept(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    values = ("1e-3 1e-2", "5e-4 1e-3", "9e-4 1e-2")
    cases = "".join(
        f'<testcase><properties><property name="error: x" value="{value}"/></properties></testcase>' for value in values
    )
    report.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    (row,) = (row for row in read_rows(report, 1.0) if row.what == "x")
    assert (row.value, row.bound, row.met) == (5e-4, "<= 0.001", True)


def test_the_script_says_how_it_is_used() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_tests", "--help"], capture_output=True, text=True, check=True
    )
    assert "pytest -m gpu" in done.stdout and "--results" in done.stdout
