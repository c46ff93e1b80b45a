"""Checkpoints of a run: complete or absent, verified before use, the newest ones and the best ones kept.

    checkpoints/step-00000100/…             whatever the trainer writes
    checkpoints/step-00000100/manifest.json size and SHA-256 of every file
    checkpoints/best.json                   slot -> step of its best validation

This module does not know what a checkpoint holds.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from tenon.runs.atomic import clean_leftovers, remove_folder, write_file_atomic, write_folder_atomic
from tenon.runs.space import require_space
from tenon.values import Value

MANIFEST = "manifest.json"
BEST = "best.json"
_NAME = re.compile(r"step-(\d{8,})")


class FileFacts(Value):
    """Size and content of one file."""

    sha256: str
    size_bytes: int


class Manifest(Value):
    """Every file of a checkpoint by its path inside the folder."""

    step: int
    files: dict[str, FileFacts]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.files.values())


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint: the step that was done last, its folder, and its files."""

    step: int
    folder: Path
    manifest: Manifest


class CheckpointStore:
    """The checkpoints of one run.

    keep: how many of the newest stay (at least 1); the best of each slot stays as well. Two, so that one damaged
    checkpoint costs a few steps and not the run.
    on_damage: told each damaged checkpoint's folder name and what is wrong, once.
    before_publish: called when a checkpoint is written and before it gets its name (the event log is synced here, so
    that no published checkpoint is ahead of it).
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 2,
        *,
        on_damage: Callable[[str, str], None] = lambda _name, _why: None,
        before_publish: Callable[[], None] = lambda: None,
    ) -> None:
        if keep < 1:
            raise ValueError("a run keeps at least one checkpoint")
        self.folder = folder
        self.keep = keep
        self._on_damage = on_damage
        self._before_publish = before_publish
        self._damaged: set[str] = set()

    def open(self) -> None:
        """Make the folder and remove what killed writers left; for the process that holds the run's lock."""
        self.folder.mkdir(parents=True, exist_ok=True)
        clean_leftovers(self.folder)

    def write(self, step: int, writer: Callable[[Path], None], *, need_bytes: int = 0) -> Checkpoint:
        """Let `writer` fill a folder, publish it as the checkpoint of `step`, and prune older ones.

        need_bytes: what it will take, if known; the size of the newest one otherwise. Raises RunError run-disk-full
        before or while writing, with every earlier checkpoint intact.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        place = self.folder / checkpoint_name(step)
        need_bytes = need_bytes or self._newest_size_bytes()
        require_space(place, need_bytes, f"the checkpoint of step {step}")
        manifests: list[Manifest] = []

        def write_all(aside: Path) -> None:
            writer(aside)
            manifests.append(_make_manifest(step, aside))
            (aside / MANIFEST).write_text(manifests[0].to_json())
            self._before_publish()

        write_folder_atomic(place, write_all, replace=True, need_bytes=need_bytes or None)
        self._damaged.discard(place.name)
        self.prune()
        return Checkpoint(step, place, manifests[0])

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose every file is as it was written; damaged ones are named and passed over."""
        for step in reversed(self.steps()):
            found = self._verified(step)
            if found is not None:
                return found
        return None

    def steps(self) -> tuple[int, ...]:
        """Steps that have a checkpoint folder, ascending; nothing is verified."""
        if not self.folder.is_dir():
            return ()
        names = (_NAME.fullmatch(place.name) for place in self.folder.iterdir())
        return tuple(sorted(int(name[1]) for name in names if name))

    def mark_best(self, step: int, slot: str = "") -> None:
        """Keep the checkpoint of `step` as the best of `slot`; it must have been written."""
        if step not in self.steps():
            raise ValueError(f"step {step} has no checkpoint to be the best of slot {slot!r}")
        self.folder.mkdir(parents=True, exist_ok=True)
        best = self.best_steps() | {slot: step}
        write_file_atomic(self.folder / BEST, json.dumps(best, sort_keys=True).encode())

    def best(self, slot: str = "") -> Checkpoint | None:
        """The best checkpoint of `slot`, verified; None when none was marked or it is damaged (and then named)."""
        step = self.best_steps().get(slot)
        return None if step is None else self._verified(step)

    def best_steps(self) -> dict[str, int]:
        """slot -> step of its best checkpoint."""
        try:
            marked = json.loads((self.folder / BEST).read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        if not isinstance(marked, dict):
            return {}
        return {slot: step for slot, step in marked.items() if isinstance(step, int)}

    def prune(self) -> None:
        """Remove all but the newest `keep` whole ones and the best ones."""
        whole = [step for step in self.steps() if self._looks_whole(step)]
        kept = {*whole[-self.keep :], *self.best_steps().values()}
        # While nothing whole is left to go back to, even a damaged one may be worth a look by hand.
        for step in self.steps() if whole else ():
            if step not in kept:
                remove_folder(self.folder / checkpoint_name(step))

    def _verified(self, step: int) -> Checkpoint | None:
        folder = self.folder / checkpoint_name(step)
        checked = verify_folder(folder)
        if isinstance(checked, Manifest):
            return Checkpoint(step, folder, checked)
        if folder.name not in self._damaged:
            self._damaged.add(folder.name)
            self._on_damage(folder.name, checked)
        return None

    def _looks_whole(self, step: int) -> bool:
        """Sizes alone: hashing every checkpoint at every write would cost more than it tells."""
        name = checkpoint_name(step)
        return name not in self._damaged and isinstance(verify_folder(self.folder / name, hashes=False), Manifest)

    def _newest_size_bytes(self) -> int:
        for step in reversed(self.steps()):
            manifest = _read_manifest(self.folder / checkpoint_name(step))
            if isinstance(manifest, Manifest):
                return manifest.size_bytes
        return 0


def checkpoint_name(step: int) -> str:
    """`step-00000100`."""
    return f"step-{step:08d}"


def verify_folder(folder: Path, *, hashes: bool = True) -> Manifest | str:
    """The manifest, when every file is there as it was written; else what is wrong, in words."""
    manifest = _read_manifest(folder)
    if isinstance(manifest, str):
        return manifest
    for name, facts in manifest.files.items():
        place = folder / name
        if not place.is_file():
            return f"{name} is missing"
        size_bytes = place.stat().st_size
        if size_bytes != facts.size_bytes:
            return f"{name} has {size_bytes:,} bytes instead of {facts.size_bytes:,}"
        if hashes and hash_file(place) != facts.sha256:
            return f"{name} does not hold what was written"
    return manifest


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make_manifest(step: int, folder: Path) -> Manifest:
    files = sorted(place for place in folder.rglob("*") if place.is_file())
    return Manifest(
        step=step,
        files={
            place.relative_to(folder).as_posix(): FileFacts(sha256=hash_file(place), size_bytes=place.stat().st_size)
            for place in files
        },
    )


def _read_manifest(folder: Path) -> Manifest | str:
    try:
        return Manifest.from_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except ValidationError:
        return f"{MANIFEST} is damaged"
