"""The GPU tests on this machine, in one file: what passed, how long it took, and each kernel's worst error.

    python benchmarks/gpu_tests.py [--results FILE] [--log FILE] [WORD of pytest …]

runs `pytest -m gpu` over the folders below and writes benchmarks/results/gpu_tests.json. Tests record their errors (see
tests/gpu/conftest.py); of each kernel and dtype the one that came nearest to its bound is kept, and the names of tests
that failed. A file that cannot be collected here, because a package is missing, counts as an error and leaves the
others alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

if __name__ == "__main__":
    # The repository's root, not this folder, is where the benchmarks are a package.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.gpu.machine import OUR_CODE, code_hash, read_machine
from benchmarks.report import REPOSITORY, RESULTS, Row, at_least, at_most, current_commit, write_tree

FOLDERS = ("tests/gpu", "tests/kernels", "tests/models", "tests/train")
# The configuration's own words ask for plug-ins that a GPU machine need not have.
WORDS = ("-m", "gpu", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "--continue-on-collection-errors")
_ERROR = "error: "


def read_rows(report: Path, seconds: float) -> list[Row]:
    """The rows of a JUnit report: counts first, then errors by name. Raises ParseError for one that is cut off."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    counts = {kind: sum(1 for case in cases if case.find(kind) is not None) for kind in ("failure", "error", "skipped")}
    return [
        at_least("passed", float(len(cases) - sum(counts.values())), "tests", 1),
        at_most("failed", float(counts["failure"]), "tests", 0),
        at_most("errors", float(counts["error"]), "tests", 0),
        Row("skipped", float(counts["skipped"]), "tests"),
        Row("time", seconds, "s"),
        *_errors(cases),
    ]


def failed_tests(report: Path) -> list[str]:
    """What failed or could not be collected, as pytest takes it: `tests/gpu/test_loss.py::test_x[1]`."""
    cases = ElementTree.parse(report).getroot().iter("testcase")
    return sorted(_name(case) for case in cases if case.find("failure") is not None or case.find("error") is not None)


def _name(case: ElementTree.Element) -> str:
    module, name = case.get("classname", ""), case.get("name", "")
    # A file that cannot be collected is a case without a class, named as a module.
    return f"{module.replace('.', '/')}.py::{name}" if module else f"{name.replace('.', '/')}.py"


def _errors(cases: Iterable[ElementTree.Element]) -> list[Row]:
    """Of each name the error nearest to its bound; without a bound the largest."""
    worst: dict[str, tuple[float, Row]] = {}
    for case in cases:
        for found in case.iter("property"):
            name = found.get("name", "")
            if not name.startswith(_ERROR):
                continue
            error, *bound = (float(word) for word in found.get("value", "").split())
            row = Row(name.removeprefix(_ERROR), error, "relative error")
            if bound:
                row = at_most(row.what, error, row.unit, bound[0])
            # NaN is above any bound.
            share = error / bound[0] if bound else error
            share = share if share == share else float("inf")
            if row.what not in worst or share > worst[row.what][0]:
                worst[row.what] = (share, row)
    return [row for _, (_, row) in sorted(worst.items())]


def run_tests(folders: Sequence[str], words: Sequence[str], report: Path, log: Path | None) -> tuple[int, float]:
    """(pytest's exit status, seconds). log: where its output goes, here when None."""
    command = [sys.executable, "-m", "pytest", *folders, *WORDS, f"--junitxml={report}", *words]
    started = datetime.now(UTC)
    if log is None:
        status = subprocess.run(command, cwd=REPOSITORY, check=False).returncode
    else:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            status = subprocess.run(command, cwd=REPOSITORY, stdout=file, stderr=file, check=False).returncode
    return status, (datetime.now(UTC) - started).total_seconds()


def main(words: Sequence[str]) -> int:
    """Run, write, and print what falls short. 1 when anything does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu_tests.json")
    parser.add_argument("--log", type=Path)
    parser.add_argument("--folder", action="append", dest="folders", help="of tests, instead of all")
    asked, more = parser.parse_known_args(words)
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        status, seconds = run_tests(asked.folders or FOLDERS, more, report, asked.log)
        if not report.is_file():
            print(f"pytest ended with {status} and left no report; see {asked.log or 'above'}")
            return 1
        rows, failed = read_rows(report, seconds), failed_tests(report)
    machine = read_machine("cuda")
    write_tree(
        asked.results,
        rows,
        device=machine.title,
        date=datetime.now(UTC).date().isoformat(),
        commit=current_commit(),
        versions=machine.versions,
        more={"driver": machine.driver, "code": code_hash(OUR_CODE), "failed": failed},
    )
    short = [row for row in rows if row.met is False]
    for row in [*rows[:5], *(row for row in short if row not in rows[:5])]:
        print(f"{row.what}: {row.value:g} {row.unit}{f' ({row.bound})' if row.met is False else ''}")
    print(asked.results)
    return 1 if short or status else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
