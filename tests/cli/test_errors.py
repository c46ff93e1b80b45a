"""What a user sees when something is wrong: one form, no traceback unless asked for, documented statuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tenon.cli.run import crash_hook
from tenon.settings import Settings, child_environment

from .conftest import Command


def test_an_error_has_code_what_and_hint(tenon: Command) -> None:
    done = tenon("plan", "absent.yaml")
    assert done.status == 2 and done.out == ""
    assert done.err.startswith("error[recipe-missing]: there is no recipe at absent.yaml\n  hint: ")


def test_p25_an_unknown_key_names_the_nearest(tenon: Command) -> None:
    done = tenon("plan", "demo.yaml", "lora.rnak=3")
    assert done.status == 2 and "error[recipe-unknown-key]" in done.err and "`lora.rank`" in done.err


def test_no_recipe(tenon: Command) -> None:
    done = tenon("train", "lora.rank=4")
    assert done.status == 2 and "error[usage-no-recipe]" in done.err and "got:  lora.rank=4" in done.err


def test_an_unknown_command_is_the_command_line_s_fault(tenon: Command) -> None:
    assert tenon("trian").status == 2


@pytest.mark.parametrize("words", [("--debug", "plan", "absent.yaml"), ("plan", "absent.yaml", "--debug")])
def test_p27_tracebacks_only_when_asked_for(tenon: Command, words: tuple[str, ...]) -> None:
    done = tenon(*words)
    assert "Traceback" in done.err and "error[recipe-missing]" in done.err


def test_p27_an_unexpected_exception_is_one_message_and_a_file(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    error = ZeroDivisionError("nobody thought of this")
    crash_hook(settings)(type(error), error, None)
    err = capsys.readouterr().err
    (log,) = (settings.home / "logs").iterdir()
    assert err.startswith("error[internal]: ZeroDivisionError: nobody thought of this\n  hint: ")
    assert str(log) in err and "Traceback" not in err
    assert "nobody thought of this" in log.read_text()


def test_p27_a_crash_without_a_place_for_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    settings = Settings(home=blocked, cache=blocked, offline=True, threads=1, debug=False)
    crash_hook(settings)(ValueError, ValueError(), None)
    assert "what --debug shows" in capsys.readouterr().err


def test_no_color_is_respected(workplace: Path, fake_settings: Settings) -> None:
    environ = {**child_environment(fake_settings), "NO_COLOR": "1", "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    done = subprocess.run(
        [sys.executable, "-m", "tenon.cli.main", "plan", "demo.yaml"],
        env=environ, cwd=workplace, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "\x1b[3" not in done.stdout and "demo" in done.stdout
