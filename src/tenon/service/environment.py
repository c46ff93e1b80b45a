"""Whether this installation can do heavy work: looked up in package metadata, so that nothing heavy is imported.

This module does not know what the packages do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import metadata

from tenon.errors import PlanError, UsageError

# What heavy work cannot do without; the train extra of pyproject.toml names the same versions (a test compares).
OLDEST: dict[str, str] = {"torch": "2.11", "transformers": "5.17"}
_TOO_OLD = {"torch": "plan-torch-version", "transformers": "plan-transformers-version"}
NEEDED = (
    "gguf",
    "jinja2",
    "orjson",
    "psutil",
    "pyarrow",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
)
# The serve extra names the same.
NEEDED_TO_SERVE = ("fastapi", "httpx", "llguidance", "prometheus-client", "uvicorn")
# The trace extra names the same.
NEEDED_TO_TRACE = ("opentelemetry-api", "opentelemetry-exporter-otlp-proto-http", "opentelemetry-sdk")


def require_training(version_of: Callable[[str], str] = metadata.version) -> None:
    """Raise unless the packages for heavy work are installed and new enough.

    version_of: gives the version of an installed package, or raises PackageNotFoundError. Raises UsageError
    usage-extra-missing; PlanError plan-torch-version, plan-transformers-version.
    """
    found = {name: _version(name, version_of) for name in NEEDED}
    _require(found, "this installation can plan but not compute", "train")
    for name, oldest in OLDEST.items():
        version = found[name]
        if version is not None and _numbers(version) < _numbers(oldest):
            raise PlanError(
                _TOO_OLD[name],
                f"{name} is too old: tenon needs {oldest} or newer",
                got=f"{name} {version}",
                hint=f"pip install --upgrade '{name}>={oldest}'",
            )


def require_serving(version_of: Callable[[str], str] = metadata.version) -> None:
    """`require_training`, and what HTTP needs. Raises UsageError usage-extra-missing, and those of it."""
    require_training(version_of)
    found = {name: _version(name, version_of) for name in NEEDED_TO_SERVE}
    _require(found, "this installation cannot serve", "train,serve")


def require_tracing(version_of: Callable[[str], str] = metadata.version) -> None:
    """What traces need. Raises UsageError usage-extra-missing."""
    found = {name: _version(name, version_of) for name in NEEDED_TO_TRACE}
    _require(found, "this installation cannot trace", "train,serve,trace")


def _require(found: dict[str, str | None], fact: str, extras: str) -> None:
    missing = [name for name, version in found.items() if version is None]
    if missing:
        raise UsageError(
            "usage-extra-missing",
            f"{fact}: packages are missing",
            got=f"no {', '.join(missing)}",
            hint=f"pip install 'tenonlm[{extras}]'",
        )


def _version(name: str, version_of: Callable[[str], str]) -> str | None:
    try:
        return version_of(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` -> (2, 13, 0): enough to compare releases."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
