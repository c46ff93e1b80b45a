"""Commands typed into a world, in this process where a process of their own shows nothing more; and what was told."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from tenon.cli.run import run
from tests.journeys.world import World

_ERROR = re.compile(r"^error\[([a-z-]+)\]: (.*)\n(?:  got:  (.*)\n)?  hint: (.*)$", flags=re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Told:
    """How a command line ended: its exit status, and its one error in parts."""

    status: int
    code: str
    what: str
    got: str
    hint: str


@dataclass(frozen=True, slots=True)
class Keyboard:
    """Types commands in a world's folder."""

    world: World
    capsys: pytest.CaptureFixture[str]

    def type(self, *words: str) -> tuple[int, str, str]:
        """Run a command line; (exit status, standard output, standard error)."""
        self.capsys.readouterr()
        status = run(words, self.world.settings)
        out, err = self.capsys.readouterr()
        return status, out, err

    def refused(self, *words: str) -> Told:
        """Run a command line that has to end with exactly one error."""
        status, out, err = self.type(*words)
        return read_error(status, out, err)


def read_error(status: int, out: str, err: str) -> Told:
    """The one error that was told, with all its parts, nothing of a traceback, and nothing else that looks like one."""
    found = _ERROR.findall(err)
    assert len(found) == 1, err
    assert "Traceback" not in out + err and err.count("error[") == 1
    code, what, got, hint = found[0]
    assert what and hint
    return Told(status, code, what, got, hint)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, but for the lock, which tells who came last."""
    return {
        str(place.relative_to(folder)): place.read_bytes()
        for place in sorted(folder.rglob("*"))
        if place.is_file() and place.name != "lock"
    }
