"""A workplace for commands: a folder with a recipe and rows, and settings that ask for the fake worker."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tenon.cli.run import run
from tenon.settings import Settings


@dataclass(frozen=True)
class Done:
    """How a command line ended, and what it wrote."""

    status: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture
def fake_settings(settings: Settings) -> Settings:
    """Settings with the fake worker."""
    return dataclasses.replace(settings, worker="tenon.worker.fake")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that commands are typed in: `demo.yaml` and its rows."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(250):
            turns = [("user", f"what is {number} plus one?"), ("assistant", str(number + 1))]
            row = {"messages": [{"role": role, "content": text} for role, text in turns]}
            file.write(json.dumps(row) + "\n")
    write_recipe(folder, "demo")
    return folder


def write_recipe(folder: Path, name: str, *, steps: int = 20) -> Path:
    """A recipe of that name over the workplace's rows."""
    path = folder / f"{name}.yaml"
    path.write_text(f"base: smollm2-135m\nname: {name}\ndata:\n  train: rows.jsonl\nlimits:\n  steps: {steps}\n")
    return path


@pytest.fixture
def tenon(workplace: Path, fake_settings: Settings, capsys: pytest.CaptureFixture[str]) -> Command:
    """Types a command line in the workplace."""

    def type_command(*words: str) -> Done:
        capsys.readouterr()
        status = run(words, fake_settings)
        written = capsys.readouterr()
        return Done(status, written.out, written.err)

    return type_command
