"""Tasks that worker processes can import: what the tests of workers let them do."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenon.errors import DataError


@dataclass(frozen=True)
class Square:
    """Answers number squared, with what it found in the memo."""

    number: int

    def run(self, memo: dict[Any, Any]) -> tuple[int, int]:
        memo["calls"] = memo.get("calls", 0) + 1
        return self.number**2, os.getpid()


@dataclass(frozen=True)
class Refuse:
    """Raises as data do."""

    def run(self, memo: dict[Any, Any]) -> None:
        raise DataError("data-row-empty", "rows.jsonl:3: the text is empty", hint="fill it")


@dataclass(frozen=True)
class DieOnce:
    """Kills its process the first time, works the second."""

    marker: Path

    def run(self, memo: dict[Any, Any]) -> str:
        if not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return "done"


@dataclass(frozen=True)
class DieInWorkers:
    """Kills any process but the one that made it."""

    home: int

    def run(self, memo: dict[Any, Any]) -> str:
        if os.getpid() != self.home:
            os.kill(os.getpid(), signal.SIGKILL)
        return "done at home"


@dataclass(frozen=True)
class Sleep:
    """Sleeps."""

    seconds: float

    def run(self, memo: dict[Any, Any]) -> None:
        time.sleep(self.seconds)


@dataclass(frozen=True)
class Imports:
    """Which heavy modules the worker holds."""

    def run(self, memo: dict[Any, Any]) -> list[str]:
        from tenon.data import tokens

        assert tokens
        return [name for name in ("torch", "transformers", "pyarrow", "huggingface_hub") if name in sys.modules]
