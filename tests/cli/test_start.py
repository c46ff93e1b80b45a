"""How commands start: quickly, without heavy imports, on a Python that will do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tenon.cli.main import python_complaint
from tenon.settings import Settings, child_environment

SOURCE = Path(__file__).resolve().parents[2] / "src" / "tenon"

# Prints what was imported, after running one command line.
PROBE = """
import sys
from tenon.cli.run import run
from tenon.settings import read_settings
status = run({words!r}, read_settings())
heavy = [name for name in {names!r} if name in sys.modules]
sys.stderr.write(f"\\nstatus {{status}} heavy {{heavy}}\\n")
"""


def imported(words: list[str], names: list[str], settings: Settings) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(words=words, names=names)],
        env=child_environment(settings),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["chat", "--help"], ["adapters", "--help"]])
def test_p29_help_imports_nothing_heavy(words: list[str], settings: Settings) -> None:
    # Help of a command with parameters brings pydantic: typer converts defaults with it.
    names = ["torch", "transformers", "numpy", "yaml", "rich.console", "tenon.plan.values"]
    assert imported(words, names, settings) == "status 0 heavy []"


@pytest.mark.parametrize("words", [["adapters", "list"], ["runs"], ["recipe", "fields"]])
def test_p29_commands_without_a_model_import_no_torch(words: list[str], settings: Settings) -> None:
    assert imported(words, ["torch", "transformers", "numpy"], settings) == "status 0 heavy []"


def test_p29_help_takes_little_time(settings: Settings) -> None:
    """CPU time, because other work shares the machine: benchmarks/spine_start.py measures the clock."""
    command = [sys.executable, "-m", "tenon.cli.main", "--help"]
    timed = f"import resource, subprocess; subprocess.run({command!r}, stdout=subprocess.DEVNULL, check=True); "
    timed += "u = resource.getrusage(resource.RUSAGE_CHILDREN); print(u.ru_utime + u.ru_stime)"
    done = subprocess.run(
        [sys.executable, "-c", timed], env=child_environment(settings), capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 0.5


@pytest.mark.parametrize("version", [(3, 8, 18), (3, 10, 0), (2, 7, 18)])
def test_an_old_python_is_one_clear_error(version: tuple[int, int, int]) -> None:
    complaint = python_complaint(version)
    assert complaint.startswith("error[usage-python-version]: tenon needs Python 3.11 or newer\n")
    assert f"got:  Python {'.'.join(map(str, version))}\n" in complaint and "hint:" in complaint


@pytest.mark.parametrize("version", [(3, 11, 0), (3, 14, 1), (4, 0, 0)])
def test_a_newer_python_is_no_error(version: tuple[int, int, int]) -> None:
    assert python_complaint(version) == ""


def test_the_entry_can_be_read_by_an_old_python() -> None:
    """What is imported before the version is known must parse on 3.8."""
    for name in ("__init__.py", "cli/__init__.py", "cli/main.py"):
        ast.parse((SOURCE / name).read_text(), feature_version=(3, 8))
