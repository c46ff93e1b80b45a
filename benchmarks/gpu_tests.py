"""The GPU tests on this machine, in one file: what passed, how long it took, and each kernel's worst error.

    python benchmarks/gpu_tests.py [--results FILE] [--log FILE] [--workers N] [WORD of pytest …]

runs `pytest -m gpu` over the folders below and writes benchmarks/results/gpu_tests.json. Several workers (pytest-xdist)
share the GPU; what is marked `alone` runs afterwards, in one process. Tests record their errors (see
tests/gpu/conftest.py); of each kernel and dtype the one that came nearest to its bound is kept, and the names of tests
that failed. A file that cannot be collected here, because a package is missing, counts as one error and leaves the
others alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

if __name__ == "__main__":
    # The repository's root, not this folder, is where the benchmarks are a package.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.gpu.machine import OUR_CODE, code_hash, read_machine
from benchmarks.report import REPOSITORY, RESULTS, Row, at_least, at_most, current_commit, write_tree

FOLDERS = ("tests/gpu", "tests/kernels", "tests/models", "tests/train")
# What may share the GPU, and what may not.
SHARING, ALONE = "gpu and not alone", "gpu and alone"
# The configuration's own words ask for plug-ins that a GPU machine need not have.
WORDS = ("-q", "-o", "addopts=", "-p", "no:cacheprovider", "--continue-on-collection-errors")
_ERROR = "error: "
# pytest's exit status where no test has the mark.
_NO_TESTS = 5


def read_cases(reports: Iterable[Path]) -> list[ElementTree.Element]:
    """The tests of JUnit reports. What an earlier one has too, a file that cannot be collected, counts there alone.

    Raises ParseError for a report that is cut off.
    """
    cases: list[ElementTree.Element] = []
    seen: set[str] = set()
    for report in reports:
        cases += [case for case in ElementTree.parse(report).getroot().iter("testcase") if _name(case) not in seen]
        seen |= {_name(case) for case in cases}
    return cases


def rows_of(cases: Sequence[ElementTree.Element], seconds: float) -> list[Row]:
    """Counts first, then errors by name."""
    counts = {kind: sum(1 for case in cases if case.find(kind) is not None) for kind in ("failure", "error", "skipped")}
    return [
        at_least("passed", float(len(cases) - sum(counts.values())), "tests", 1),
        at_most("failed", float(counts["failure"]), "tests", 0),
        at_most("errors", float(counts["error"]), "tests", 0),
        Row("skipped", float(counts["skipped"]), "tests"),
        Row("time", seconds, "s"),
        *_errors(cases),
    ]


def failed_tests(cases: Iterable[ElementTree.Element]) -> list[str]:
    """What failed or could not be collected, as pytest takes it: `tests/gpu/test_loss.py::test_x[1]`."""
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


@dataclass(frozen=True, slots=True)
class Ran:
    """How the tests went. status: pytest's, the first that is not good. reports: a JUnit file of each part; one that
    pytest did not come to write is missing.
    """

    status: int
    seconds: float
    reports: tuple[Path, ...]


def run_tests(
    folders: Sequence[str], words: Sequence[str], scratch: Path, log: Path | None, *, workers: int = 1
) -> Ran:
    """Run what shares the GPU, then what needs it alone. log: where output goes, here when None."""
    parts = {SHARING: ["-n", str(workers)] if workers > 1 else [], ALONE: []}
    started = datetime.now(UTC)
    statuses, reports = list[int](), list[Path]()
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    with nullcontext() if log is None else log.open("w") as file:
        for number, (marked, more) in enumerate(parts.items()):
            reports.append(scratch / f"report{number}.xml")
            command = [sys.executable, "-m", "pytest", *folders, "-m", marked, *WORDS, *more]
            command += [f"--junitxml={reports[-1]}", *words]
            done = subprocess.run(command, cwd=REPOSITORY, stdout=file, stderr=file, check=False)
            statuses.append(done.returncode)
    # Where no test at all has the mark, the count of those that passed says so.
    status = next((status for status in statuses if status not in (0, _NO_TESTS)), 0)
    return Ran(status, (datetime.now(UTC) - started).total_seconds(), tuple(reports))


def main(words: Sequence[str]) -> int:
    """Run, write, and print what falls short. 1 when anything does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu_tests.json")
    parser.add_argument("--log", type=Path)
    parser.add_argument("--folder", action="append", dest="folders", help="of tests, instead of all")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes on the GPU, by default 1")
    asked, more = parser.parse_known_args(words)
    with tempfile.TemporaryDirectory() as scratch:
        ran = run_tests(asked.folders or FOLDERS, more, Path(scratch), asked.log, workers=asked.workers)
        if not all(report.is_file() for report in ran.reports):
            print(f"pytest ended with {ran.status} and left no report; see {asked.log or 'above'}")
            return 1
        cases = read_cases(ran.reports)
    rows, failed = rows_of(cases, ran.seconds), failed_tests(cases)
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
    return 1 if short or ran.status else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
