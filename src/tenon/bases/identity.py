"""The content hash of a base: what adapters and prepared copies are bound to.

A GGUF base is hashed as the SHA-256 of its file. A folder is hashed over its config, weights and tokenizer files, by
name and content; chat template (tokenizer_config.json) and generation settings may change, and the base is the same.
This module reads bytes and understands none.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from tenon.bases.locate import BaseLocation
from tenon.bases.weights import INDEX, weight_files
from tenon.settings import Settings
from tenon.values import hash_text

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


def hash_base(location: BaseLocation, settings: Settings) -> str:
    """SHA-256 over a base's contents, 64 hex digits.

    Hashes of files are kept in the cache by path, size and time of change, so that only the first call reads it all.
    Raises: BaseModelError base-not-a-model, base-shard-missing.
    """
    if location.kind == "gguf":
        return _hash_file(location.path, settings.cache / "hashes")
    folder = location.path
    optional = [folder / name for name in (INDEX, *_TOKENIZER_FILES)]
    files = [folder / "config.json", *weight_files(folder), *(file for file in optional if file.is_file())]
    lines = sorted(f"{file.name} {_hash_file(file, settings.cache / 'hashes')}" for file in files)
    return hash_text("\n".join(lines))


def _hash_file(file: Path, cache: Path) -> str:
    real = file.resolve()
    status = real.stat()
    entry = cache / f"{hash_text(str(real))}.json"
    key = {"path": str(real), "size_bytes": status.st_size, "changed_ns": status.st_mtime_ns}
    known = _read_entry(entry)
    if known is not None and {name: known.get(name) for name in key} == key:
        return str(known["sha256"])
    with real.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    cache.mkdir(parents=True, exist_ok=True)
    aside = entry.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps({**key, "sha256": digest}), "utf-8")
    aside.replace(entry)
    return digest


def _read_entry(entry: Path) -> dict[str, object] | None:
    """A cached hash, or None where there is none or it is unreadable (it will be made again)."""
    try:
        tree = json.loads(entry.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) and "sha256" in tree else None
