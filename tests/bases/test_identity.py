"""The hash of a base: the same contents, the same hash, wherever they lie; anything that matters changes it."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from tenon.bases.identity import hash_base
from tenon.bases.locate import BaseLocation
from tenon.settings import Settings


@pytest.fixture
def base(tmp_path: Path) -> BaseLocation:
    folder = tmp_path / "base"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"):
        (folder / name).write_text(f"contents of {name}")
    return BaseLocation("base", folder, "folder")


def test_p18_a_copy_has_the_same_hash(base: BaseLocation, settings: Settings, tmp_path: Path) -> None:
    copy = shutil.copytree(base.path, tmp_path / "copy")
    first = hash_base(base, settings)
    assert len(first) == 64
    assert hash_base(BaseLocation("copy", copy, "folder"), settings) == first


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_p18_what_matters_changes_the_hash(name: str, base: BaseLocation, settings: Settings) -> None:
    first = hash_base(base, settings)
    (base.path / name).write_text("something else")
    assert hash_base(base, settings) != first


@pytest.mark.parametrize("name", ["tokenizer_config.json", "README.md"])
def test_what_does_not_matter_does_not(name: str, base: BaseLocation, settings: Settings) -> None:
    first = hash_base(base, settings)
    (base.path / name).write_text("something else")
    assert hash_base(base, settings) == first


def test_a_gguf_base_has_the_hash_of_its_file(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "base.gguf"
    path.write_bytes(b"GGUF and more")
    assert hash_base(BaseLocation("b", path, "gguf"), settings) == hashlib.sha256(b"GGUF and more").hexdigest()


def test_the_cache_is_used_and_outdated_entries_are_not(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "base.gguf"
    path.write_bytes(b"GGUF1")
    location = BaseLocation("b", path, "gguf")
    first = hash_base(location, settings)
    status = path.stat()
    path.write_bytes(b"GGUF2")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert hash_base(location, settings) == first, "same path, size and time of change: not read again"
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert hash_base(location, settings) == hashlib.sha256(b"GGUF2").hexdigest()


def test_a_damaged_cache_entry_is_made_again(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "base.gguf"
    path.write_bytes(b"GGUF1")
    first = hash_base(BaseLocation("b", path, "gguf"), settings)
    (entry,) = (settings.cache / "hashes").iterdir()
    entry.write_text("{")
    assert hash_base(BaseLocation("b", path, "gguf"), settings) == first
