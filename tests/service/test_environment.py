"""Whether this installation can compute: missing packages and old versions are one clear error each."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from tenon.errors import PlanError, TenonError, UsageError
from tenon.service.environment import (
    NEEDED,
    NEEDED_TO_SERVE,
    NEEDED_TO_TRACE,
    OLDEST,
    require_serving,
    require_tracing,
    require_training,
)

PROJECT = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())


def refusal(**versions: str | None) -> TenonError:
    """What is said of an installation with these versions; the rest is there and new."""

    def version_of(name: str) -> str:
        version = versions.get(name, "99.0")
        if version is None:
            raise PackageNotFoundError(name)
        return version

    with pytest.raises(TenonError) as error:
        require_training(version_of)
    return error.value


def test_this_installation_can_compute() -> None:
    require_training()


def test_a_missing_extra_names_the_command() -> None:
    error = refusal(torch=None, pyarrow=None)
    assert isinstance(error, UsageError) and error.code == "usage-extra-missing"
    assert error.got == "no pyarrow, torch" and error.hint == "pip install 'tenonlm[train]'"


def test_serving_needs_more() -> None:
    require_serving(lambda _name: "99.0")

    def version_of(name: str) -> str:
        if name == "uvicorn":
            raise PackageNotFoundError(name)
        return "99.0"

    with pytest.raises(UsageError) as error:
        require_serving(version_of)
    assert error.value.got == "no uvicorn" and error.value.hint == "pip install 'tenonlm[train,serve]'"


def test_tracing_needs_its_own() -> None:
    require_tracing(lambda _name: "1.45")

    def version_of(name: str) -> str:
        raise PackageNotFoundError(name)

    with pytest.raises(UsageError) as error:
        require_tracing(version_of)
    assert error.value.hint == "pip install 'tenonlm[train,serve,trace]'"


@pytest.mark.parametrize("version", ["2.10.1", "2.9.0+cu128", "1.13.1"])
def test_an_old_torch(version: str) -> None:
    error = refusal(torch=version)
    assert isinstance(error, PlanError) and error.code == "plan-torch-version" and version in error.got
    assert "torch>=2.11" in error.hint


def test_an_old_transformers() -> None:
    assert refusal(transformers="5.16.9").code == "plan-transformers-version"


def test_the_oldest_versions_do() -> None:
    require_training(lambda name: {"torch": "2.11.0+cpu", "transformers": "5.17"}.get(name, "99"))


def test_the_train_extra_names_the_same_packages_and_versions() -> None:
    extra = PROJECT["project"]["optional-dependencies"]["train"]
    named = {re.split(r"[<>=]", requirement)[0]: requirement for requirement in extra}
    assert set(NEEDED) <= set(named)
    serving = PROJECT["project"]["optional-dependencies"]["serve"]
    assert {re.split(r"[<>=]", requirement)[0] for requirement in serving} == set(NEEDED_TO_SERVE)
    tracing = PROJECT["project"]["optional-dependencies"]["trace"]
    assert {re.split(r"[<>=]", requirement)[0] for requirement in tracing} == set(NEEDED_TO_TRACE)
    for name, oldest in OLDEST.items():
        assert named[name] == f"{name}>={oldest}"
