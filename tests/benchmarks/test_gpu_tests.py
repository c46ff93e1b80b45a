"""The report of the GPU tests: counts, the worst error of each kernel, what falls short, what failed by name; what
shares the GPU and what has it alone are one report.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_tests import failed_tests, read_cases, rows_of, run_tests

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

@pytest.mark.gpu
@pytest.mark.alone
def test_alone(record_property, request):
    assert not hasattr(request.config, "workerinput")
    record_property("error: project, bfloat16", "2.6e-3 1e-2")

def test_on_a_cpu():
    raise AssertionError
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_counts_and_worst_errors(workers: int, tmp_path: Path) -> None:
    """Tests without the mark do not run; NaN is worse than any number, and named with its bound."""
    (tmp_path / "test_sample.py").write_text(SAMPLE)
    (tmp_path / "test_broken.py").write_text("import a_package_that_nobody_has\n")
    ran = run_tests([str(tmp_path)], [f"--rootdir={tmp_path}"], tmp_path, tmp_path / "log", workers=workers)
    cases = read_cases(ran.reports)
    rows = {row.what: row for row in rows_of(cases, ran.seconds)}
    assert ran.status != 0 and ran.seconds > 0 and "a_package_that_nobody_has" in (tmp_path / "log").read_text()
    counts = {name: rows[name].value for name in ("passed", "failed", "errors", "skipped")}
    assert counts == {"passed": 3, "failed": 1, "errors": 1, "skipped": 1}
    assert [rows[name].met for name in counts] == [True, False, False, None]
    assert failed_tests(cases) == ["test_broken.py", "test_sample.py::test_kernel[nan]"]
    kernel = rows["project, bfloat16"]
    assert kernel.value != kernel.value and (kernel.bound, kernel.met) == ("<= 0.0025", False)
    assert rows["whole step"].bound is None


def test_either_part_may_have_no_test(tmp_path: Path) -> None:
    (tmp_path / "test_sample.py").write_text("import pytest\n\n@pytest.mark.gpu\ndef test_it():\n    pass\n")
    ran = run_tests([str(tmp_path)], [f"--rootdir={tmp_path}"], tmp_path, tmp_path / "log")
    assert ran.status == 0 and [row.value for row in rows_of(read_cases(ran.reports), 1.0)][:3] == [1, 0, 0]


def test_the_error_nearest_to_its_bound_is_kept(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    values = ("1e-3 1e-2", "5e-4 1e-3", "9e-4 1e-2")
    cases = "".join(
        f'<testcase><properties><property name="error: x" value="{value}"/></properties></testcase>' for value in values
    )
    report.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    (row,) = (row for row in rows_of(read_cases([report]), 1.0) if row.what == "x")
    assert (row.value, row.bound, row.met) == (5e-4, "<= 0.001", True)


def test_the_script_says_how_it_is_used() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_tests", "--help"], capture_output=True, text=True, check=True
    )
    assert "pytest -m gpu" in done.stdout and "--results" in done.stdout
