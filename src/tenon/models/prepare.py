"""Make a base ready to load: a folder in Hugging Face's layout with config, safetensors, and a tokenizer.json.

A GGUF file is dequantised once into the cache, under its content hash. A folder is used where it lies; one that has
only an old-style tokenizer gets a companion in the cache (links to its files and a tokenizer.json). This module loads
no model.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tenon.bases.facts import ModelFacts
from tenon.bases.families import family_of
from tenon.bases.gguf_facts import gguf_facts
from tenon.bases.gguf_header import read_gguf
from tenon.bases.identity import hash_base
from tenon.bases.locate import BaseLocation
from tenon.errors import BaseModelError
from tenon.models.gguf_config import config_tree, generation_tree
from tenon.models.gguf_tokenizer import write_tokenizer
from tenon.models.gguf_weights import OnProgress, stored_bytes, write_weights
from tenon.runs.atomic import clean_leftovers, write_folder_atomic
from tenon.runs.space import require_space
from tenon.settings import Settings
from tenon.values import hash_text

# Part of a prepared folder's name: raised when what is written changes, so that older copies are made again.
FORMAT = 1


def prepare_base(location: BaseLocation, settings: Settings, *, on_progress: OnProgress | None = None) -> Path:
    """The folder to load the base and its tokenizer from.

    on_progress: called with bytes written and bytes in all while a GGUF file is dequantised.
    Raises: BaseModelError (damaged, unknown or unsupported base, base-tokenizer), RunError run-disk-full.
    """
    if location.kind == "gguf":
        return _in_cache(location, settings, lambda folder: _write_gguf(location.path, folder, on_progress))
    if (location.path / "tokenizer.json").is_file():
        return location.path
    return _in_cache(location, settings, lambda folder: _write_companion(location.path, folder))


def _in_cache(location: BaseLocation, settings: Settings, writer: Callable[[Path], None]) -> Path:
    """The cached folder of a base, written first where it is not there; a second process waits for the first."""
    bases = settings.cache / "bases"
    # A companion links to where its source lies, so the place is part of its name.
    place = "" if location.kind == "gguf" else f"-{hash_text(str(location.path))[:8]}"
    target = bases / f"{hash_base(location, settings)}{place}-{FORMAT}"
    if target.is_dir():
        return target
    bases.mkdir(parents=True, exist_ok=True)
    with _locked(bases / f"{target.name}.lock"):
        if not target.is_dir():
            clean_leftovers(bases)
            write_folder_atomic(target, writer)
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_gguf(path: Path, folder: Path, on_progress: OnProgress | None) -> None:
    header = read_gguf(path)
    facts = gguf_facts(header)
    require_space(folder, stored_bytes(header), f"the dequantised copy of {path.name}")
    write_tokenizer(header, folder)
    _write_configs(facts, folder)
    interleaved = family_of(facts.family, str(path)).gguf_interleaved
    weights = folder / "model.safetensors"
    write_weights(header, facts, weights, interleaved=interleaved, on_progress=on_progress)


def _write_configs(facts: ModelFacts, folder: Path) -> None:
    for name, tree in (("config.json", config_tree(facts)), ("generation_config.json", generation_tree(facts))):
        (folder / name).write_text(json.dumps(tree, indent=2), "utf-8")


def _write_companion(source: Path, folder: Path) -> None:
    """Links to everything in `source`, and the tokenizer converted by transformers."""
    from transformers import AutoTokenizer  # heavy, and needed for old folders alone

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
        tokenizer.save_pretrained(folder)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise BaseModelError(
            "base-tokenizer",
            f"{source} has no tokenizer.json, and none could be made of its other files",
            got=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}",
            hint="add the tokenizer.json of the base; for tokenizer.model alone: pip install sentencepiece protobuf",
        ) from error
    if not (folder / "tokenizer.json").is_file():
        raise BaseModelError(
            "base-tokenizer",
            f"{source} has no tokenizer.json, and its tokenizer cannot be written as one",
            got=type(tokenizer).__name__,
            hint="add the tokenizer.json of the base",
        )
    for file in source.iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).symlink_to(file.resolve())
