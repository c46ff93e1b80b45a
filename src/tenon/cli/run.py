"""One command line from words to exit status: errors are shown in one form, tracebacks only with --debug.

Exit statuses: 0 done; 1 failed; 2 the recipe or the command line is at fault; 75 stopped and saved, resume it; 130
Ctrl-C where there was nothing to save. This module does not know what the commands do.
"""

from __future__ import annotations

import dataclasses
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from typer.main import get_command

from tenon.cli.app import app
from tenon.cli.failures import show_error
from tenon.cli.session import Session
from tenon.errors import EXIT_ERROR, TenonError
from tenon.settings import Settings, read_settings

EXIT_INTERRUPTED = 130


def run_as_program(words: Sequence[str]) -> int:
    """The whole program: settings from the environment; unexpected exceptions become one line and a log file."""
    settings = read_settings()
    sys.excepthook = crash_hook(settings)
    return run(words, settings)


def run(words: Sequence[str], settings: Settings) -> int:
    """Run one command line; returns its exit status. Exceptions that are no TenonError pass through."""
    debug = settings.debug or "--debug" in words
    session = Session(dataclasses.replace(settings, debug=debug))
    command = get_command(app)
    try:
        command.main(args=[word for word in words if word != "--debug"], prog_name="tenon", obj=session)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else EXIT_ERROR if end.code else 0
    except KeyboardInterrupt:
        session.err.print("interrupted")
        return EXIT_INTERRUPTED
    except TenonError as error:
        if debug:
            session.err.print(traceback.format_exc(), markup=False, soft_wrap=True)
        show_error(session.err, error)
        return error.exit_status
    return 0


def crash_hook(
    settings: Settings,
) -> Callable[[type[BaseException], BaseException, TracebackType | None], None]:
    """A sys.excepthook that writes the traceback to a file and one line to standard error."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        report = "".join(traceback.format_exception(kind, error, trace))
        if settings.debug or "--debug" in sys.argv:
            sys.stderr.write(report)
            return
        path = _write_report(settings.home / "logs", report)
        sys.stderr.write(
            f"error[internal]: {kind.__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}\n"
            f"  hint: this is a fault of Tenon: please report it with {path}\n"
        )

    return hook


def _write_report(folder: Path, report: str) -> str:
    path = folder / f"crash-{time.strftime('%Y%m%d-%H%M%S')}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(report, encoding="utf-8")
    except OSError as error:
        return f"what --debug shows (its log could not be written: {error.strerror})"
    return str(path)
