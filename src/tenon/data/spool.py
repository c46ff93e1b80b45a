"""Makes every file one that can be read by byte offsets: plain JSONL stays where it is, all else is spooled once.

The spool is JSONL of the raw records, kept in the cache under the hash of the file's content. This module does not know
what records mean.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from tenon.data.readers import CHUNK_BYTES, UTF8_BOM, empty_file, open_bytes, read_head, read_records
from tenon.data.sources import SourceFile
from tenon.errors import DataError
from tenon.settings import Settings

# Goes into every cache key: raise it when what is cached changes its meaning.
SPOOL_VERSION = 1
HASH_CHUNK_BYTES = 1 << 20
BAD_KEPT = 50
RECORD_HINTS = {"data-csv-ragged": "give the row as many fields as the header, or set data.on_bad: drop"}
DEFAULT_HINT = "correct the row, or set data.on_bad: drop"


class BadRow(NamedTuple):
    """One row that cannot be used: its line, and what a DataError about it says."""

    line: int
    code: str
    reason: str
    got: str
    hint: str


@dataclass(frozen=True, slots=True)
class RowFile:
    """A file as plain JSONL.

    name: what messages call it. mark: between name and line number (":" lines, "#" rows). path: the JSONL; its first
    `skip` bytes are a byte-order mark. content_hash: SHA-256 of the original file. lines: .npy with the original line
    of each line of the JSONL, or None where they are the same. bad, bad_counts: records that could not be read, the
    first of them and their number by code.
    """

    name: str
    mark: str
    path: Path
    skip: int
    content_hash: str
    lines: Path | None
    bad: tuple[BadRow, ...] = ()
    bad_counts: tuple[tuple[str, int], ...] = ()


def open_rows(file: SourceFile, settings: Settings) -> RowFile:
    """The file as JSONL, spooled when it is anything else.

    Raises DataError: data-file-empty, data-encoding, data-packed-broken, data-json-broken, data-csv-broken,
    data-csv-header, data-parquet-broken.
    """
    if file.kind == "parquet":
        return _spooled(file, "parquet", settings)
    head = read_head(file)
    kind = file.kind
    if kind in ("json", "jsonl"):
        kind = "json" if head.lstrip()[:1] == b"[" else "jsonl"
    if kind == "jsonl" and not file.packing:
        skip = len(UTF8_BOM) if _starts_with_bom(file.path) else 0
        return RowFile(file.name, ":", file.path, skip, hash_file(file.path), None)
    return _spooled(file, kind, settings)


def _starts_with_bom(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(UTF8_BOM)) == UTF8_BOM


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, streamed, 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _spooled(file: SourceFile, kind: str, settings: Settings) -> RowFile:
    content_hash = hash_file(file.path)
    folder = settings.cache / "data" / "spool" / f"{content_hash}-{kind}{file.packing}-{SPOOL_VERSION}"
    if not folder.is_dir():
        with fresh_folder(folder) as aside:
            if kind == "jsonl":
                _unpack(file, aside)
            else:
                _write_spool(file, kind, aside)
    meta = orjson.loads((folder / "meta.json").read_bytes())
    return RowFile(
        name=file.name,
        mark="#" if kind == "parquet" else ":",
        path=folder / "rows.jsonl",
        skip=0,
        content_hash=content_hash,
        lines=folder / "lines.npy" if meta["lines"] else None,
        bad=tuple(BadRow(*each) for each in meta["bad"]),
        bad_counts=tuple(sorted(meta["bad_counts"].items())),
    )


@contextmanager
def mapped_io(name: str) -> Iterator[None]:
    """Whatever the system refuses within the block becomes DataError data-io about `name`."""
    try:
        yield
    except OSError as error:
        raise DataError(
            "data-io",
            f"{name}: {(error.strerror or str(error)).lower()}",
            got=str(error.filename or ""),
            hint="check that the file can be read, and that the cache (TENON_CACHE) can be written and has space",
        ) from error


@contextmanager
def fresh_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its name when the block ends well, and vanishes otherwise.

    Two processes may make the same folder: the second finds it there and throws its own away.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f"{folder.name[:16]}.", suffix=".part", dir=folder.parent))
    try:
        yield aside
        if not folder.is_dir():
            _rename_unless_there(aside, folder)
    finally:
        if aside.exists():
            shutil.rmtree(aside)


def _rename_unless_there(aside: Path, folder: Path) -> None:
    try:
        aside.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _unpack(file: SourceFile, folder: Path) -> None:
    first = True
    with open_bytes(file) as stream, (folder / "rows.jsonl").open("wb") as out:
        while chunk := stream.read(CHUNK_BYTES):
            out.write(chunk.removeprefix(UTF8_BOM) if first else chunk)
            first = False
        _sync(out.fileno())
    _write_meta(folder, lines=False, bad=[], bad_counts={})


def _write_spool(file: SourceFile, kind: str, folder: Path) -> None:
    lines: list[np.ndarray] = []
    pending: list[int] = []
    bad: list[BadRow] = []
    bad_counts: dict[str, int] = {}
    with (folder / "rows.jsonl").open("wb", buffering=CHUNK_BYTES) as out:
        for record in read_records(file, kind):
            if record.tree is None:
                bad_counts[record.code] = bad_counts.get(record.code, 0) + 1
                if len(bad) < BAD_KEPT:
                    hint = RECORD_HINTS.get(record.code, DEFAULT_HINT)
                    bad.append(BadRow(record.line, record.code, record.reason, record.got, hint))
                continue
            out.write(orjson.dumps(record.tree, default=_plain, option=orjson.OPT_APPEND_NEWLINE))
            pending.append(record.line)
            if len(pending) == 1 << 16:
                lines.append(np.array(pending, dtype=np.int64))
                pending.clear()
        out.flush()
        _sync(out.fileno())
    lines.append(np.array(pending, dtype=np.int64))
    total = np.concatenate(lines)
    if not len(total) and not bad:
        raise empty_file(file, "the file holds no row")
    np.save(folder / "lines.npy", total)
    _write_meta(folder, lines=True, bad=bad, bad_counts=bad_counts)


def _plain(value: Any) -> Any:
    """What Parquet holds and JSON does not: as text."""
    if isinstance(value, Decimal | datetime | date):
        return str(value)
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return repr(value)


def _write_meta(folder: Path, *, lines: bool, bad: list[BadRow], bad_counts: dict[str, int]) -> None:
    meta = {"lines": lines, "bad": list(map(list, bad)), "bad_counts": bad_counts}
    (folder / "meta.json").write_bytes(orjson.dumps(meta))


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)
