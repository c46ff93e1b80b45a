"""Finds the files behind what a recipe calls a source: a file, a folder, a glob, or a data set on the hub.

This module does not read rows: it knows names, suffixes and first bytes only.
"""

from __future__ import annotations

import difflib
import glob
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tenon.errors import DataError
from tenon.settings import Settings

Kind = Literal["jsonl", "json", "csv", "tsv", "parquet", "text"]
Packing = Literal["", "gz", "bz2", "xz", "zst"]

KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".txt": "text",
}
PACKINGS: dict[str, Packing] = {".gz": "gz", ".bz2": "bz2", ".xz": "xz", ".zst": "zst"}
# Files that data sets carry about themselves.
METADATA = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"})
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_PREFIX = "hf://"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of rows. name: how messages call it; kind and packing come from its suffixes."""

    path: Path
    name: str
    kind: Kind
    packing: Packing


def find_files(spec: str, settings: Settings) -> tuple[SourceFile, ...]:
    """The files behind `spec`, sorted by name; never empty.

    Raises DataError: data-file-missing, data-file-kind, data-folder-empty, data-folder-splits, data-hub-offline,
    data-hub-missing.
    """
    if spec.startswith(HUB_PREFIX):
        return _hub_files(spec.removeprefix(HUB_PREFIX), settings)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _folder_files(path, spec)
    if path.exists():
        return (_classify(path, spec),)
    if glob.has_magic(spec):
        return _glob_files(str(path), spec)
    if HUB_ID.fullmatch(spec) and not path.parent.is_dir() and path.suffix not in KINDS:
        return _hub_files(spec, settings)
    raise DataError("data-file-missing", f"{spec}: there is no such file or folder", hint=_nearest_hint(path))


def _nearest_hint(path: Path) -> str:
    folder = path.parent
    names = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"did you mean {folder / near[0]}?"
    return "check the path; it is read from the folder where the command is typed"


def _classify(path: Path, name: str) -> SourceFile:
    found = _kind_of(path.name)
    if found is None:
        raise DataError(
            "data-file-kind",
            f"{name}: the suffix does not say what kind of file this is",
            got=path.suffix or "no suffix",
            hint=f"use one of {' '.join(KINDS)}, packed or not ({' '.join(PACKINGS)})",
        )
    return SourceFile(path, name, *found)


def _kind_of(file_name: str) -> tuple[Kind, Packing] | None:
    path = Path(file_name.lower())
    packing = PACKINGS.get(path.suffix, "")
    kind = KINDS.get(path.with_suffix("").suffix if packing else path.suffix)
    return None if kind is None else (kind, packing)


def _folder_files(folder: Path, spec: str) -> tuple[SourceFile, ...]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and _is_data(path.relative_to(folder)))
    if not paths:
        raise DataError(
            "data-folder-empty",
            f"{spec}: the folder holds no file of rows",
            hint=f"put files ending in {' '.join(KINDS)} there, or name another folder",
        )
    _refuse_mixed_splits(paths, folder, spec)
    return tuple(_classify(path, str(Path(spec) / path.relative_to(folder))) for path in paths)


def _is_data(relative: Path) -> bool:
    if any(part.startswith((".", "_")) for part in relative.parts) or relative.name in METADATA:
        return False
    return _kind_of(relative.name) is not None


def _refuse_mixed_splits(paths: list[Path], folder: Path, spec: str) -> None:
    # Reading train and test files as one source would train on the test rows without a word.
    splits = {_split_of(path.relative_to(folder)) for path in paths} - {None}
    if len(splits) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in paths[:6])
        raise DataError(
            "data-folder-splits",
            f"{spec}: the folder holds files of several splits ({', '.join(sorted(filter(None, splits)))})",
            got=names,
            hint="name the files of one split, as in folder/train*.parquet, and give the others as validation",
        )


def _split_of(relative: Path) -> str | None:
    words = re.split(r"[^a-z]+", str(relative).lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


def _glob_files(pattern: str, spec: str) -> tuple[SourceFile, ...]:
    # Path.glob takes no absolute pattern.
    found = glob.glob(pattern, recursive=True)  # noqa: PTH207
    paths = sorted(path for path in map(Path, found) if path.is_file())
    if not paths:
        raise DataError(
            "data-file-missing",
            f"{spec}: no file matches the pattern",
            hint="check the pattern; ** goes through folders of any depth",
        )
    return tuple(_classify(path, str(path)) for path in paths)


def _hub_files(spec: str, settings: Settings) -> tuple[SourceFile, ...]:
    parts = spec.split("/", 2)
    repo, inside = "/".join(parts[:2]), parts[2] if len(parts) > 2 else ""
    if settings.offline:
        raise DataError(
            "data-hub-offline",
            f"{spec}: there is no such file or folder, and the hub may not be asked (offline)",
            hint="give a local file, or unset TENON_OFFLINE and HF_HUB_OFFLINE",
        )
    folder = _download(repo, inside)
    if not inside:
        return _folder_files(folder, str(folder))
    return find_files(str(folder / inside), settings)


def _download(repo: str, inside: str) -> Path:
    # The hub's client is slow to import; most runs never need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [inside, f"{inside}/**"] if inside else [f"*{suffix}*" for suffix in KINDS]
    try:
        return Path(snapshot_download(repo, repo_type="dataset", allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(
            "data-hub-missing",
            f"hf://{repo}: the data set could not be fetched: {str(error).splitlines()[0]}",
            hint="check the name and the network, log in with `hf auth login` if it is private, or give a local file",
        ) from error
