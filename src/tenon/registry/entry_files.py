"""The files of one version as its entry lists them: written down when it is registered, held against that later."""

from __future__ import annotations

import time
from pathlib import Path

from pydantic import ValidationError

from tenon.registry.contents import damaged
from tenon.registry.entry import Entry, EntryDraft
from tenon.registry.peft_check import CONFIG_NAME, TENSORS_NAME, AdapterFacts
from tenon.registry.probes import PROBES_NAME
from tenon.runs.checkpoints import FileFacts, hash_file

ENTRY_NAME = "tenon.json"
PEFT_FILES = (CONFIG_NAME, TENSORS_NAME)
# What may be kept beside the PEFT files of a version.
TEMPLATE_NAME = "chat_template.jinja"
BESIDE = frozenset({PROBES_NAME, TEMPLATE_NAME})


def make_entry(
    name: str, version: int, folder: Path, facts: AdapterFacts, draft: EntryDraft, beside: tuple[str, ...]
) -> Entry:
    """The entry of files that lie in a folder. facts: as `check_adapter` found them there."""
    return Entry(
        name=name,
        version=version,
        created=time.time(),
        base_spec=draft.base_spec,
        base_hash=draft.base_hash,
        run=draft.run,
        data_hash=draft.data_hash,
        template_hash=draft.template_hash,
        recipe_hash=draft.recipe_hash,
        metrics=draft.metrics,
        parent=draft.parent,
        system=draft.system,
        base_format=draft.base_format,
        generation=draft.generation,
        rank=facts.rank,
        alpha=facts.alpha,
        scale=facts.scale,
        targets=facts.targets,
        matrices=len(facts.sites),
        parameters=facts.parameters,
        files={file: _facts(folder / file) for file in PEFT_FILES},
        beside={file: _facts(folder / file) for file in beside},
    )


def _facts(path: Path) -> FileFacts:
    return FileFacts(sha256=hash_file(path), size_bytes=path.stat().st_size)


def require_file(folder: Path, name: str, facts: FileFacts) -> None:
    """Raises AdapterError adapter-damaged unless a file is what was registered."""
    path = folder / name
    if path.is_symlink() or not path.is_file():
        raise damaged(folder, f"{name} is missing" if not path.is_symlink() else f"{name} is a link")
    if path.stat().st_size != facts.size_bytes:
        raise damaged(folder, f"{name} has {path.stat().st_size:,} bytes instead of {facts.size_bytes:,}")
    if hash_file(path) != facts.sha256:
        raise damaged(folder, f"{name} does not hold what was registered")


def require_nothing_else(folder: Path, entry: Entry) -> None:
    """Raises AdapterError adapter-damaged when something lies in the folder that was not registered."""
    try:
        strange = sorted({place.name for place in folder.iterdir()} - {*PEFT_FILES, *entry.beside, ENTRY_NAME})
    except OSError as error:
        raise damaged(folder, "its files went away") from error
    if strange:
        raise damaged(folder, f"{strange[0]} does not belong there")


def read_entry(folder: Path) -> Entry:
    """The entry of a version's folder. Raises AdapterError adapter-damaged."""
    try:
        entry = Entry.from_json((folder / ENTRY_NAME).read_bytes())
    except FileNotFoundError as error:
        raise damaged(folder, f"{ENTRY_NAME} is missing") from error
    except ValidationError as error:
        raise damaged(folder, f"{ENTRY_NAME} is no entry of this version of Tenon") from error
    if (entry.name, str(entry.version)) != (folder.parent.name, folder.name):
        raise damaged(folder, f"{ENTRY_NAME} says that it is {entry.label}")
    if set(entry.files) != set(PEFT_FILES) or not set(entry.beside) <= BESIDE:
        raise damaged(folder, f"{ENTRY_NAME} lists other files than an adapter has")
    return entry
