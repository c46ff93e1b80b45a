"""Where each good row of a JSONL file lies, the hash of what it holds, its label; and which rows are bad.

Byte ranges are scanned in several processes when the file is large. The result is kept in the cache as numpy arrays,
under the hash of the file's content and of how it is read. This module does not know tokens or splits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from tenon.data.convert import make_converter
from tenon.data.formats import SAMPLE_ROWS, Format, detect_format
from tenon.data.messages import BadRowError
from tenon.data.readers import encoding_error
from tenon.data.rows import HASH_BYTES, Row, row_hash
from tenon.data.scan import Scan, ScanTask
from tenon.data.spool import BAD_KEPT, BadRow, RowFile, fresh_folder
from tenon.data.workers import run_tasks
from tenon.errors import DataError
from tenon.settings import Settings
from tenon.values import canonical_json, hash_text

INDEX_VERSION = 2
RANGE_BYTES = 16 << 20
ARRAYS = ("offsets", "sizes", "lines", "hashes", "label_ids")


@dataclass(frozen=True, slots=True)
class IndexedFile:
    """A file whose rows can be read one by one: small and picklable; the arrays stay on disk.

    folder: the index in the cache; its name is the index's key.
    """

    rows: RowFile
    form: Format
    folder: Path

    @property
    def key(self) -> str:
        """Hash of the file's content and of how it is read."""
        return self.folder.name


@dataclass(frozen=True, slots=True, eq=False)
class RowTable:
    """The good rows of a file, n of them, in order.

    offsets, sizes: int64, int32, bytes in the JSONL. lines: int64, in the original. hashes: uint64 of `row_hash`.
    label_ids: int32 into labels, or -1. bad, bad_counts: the first bad rows, and their number by code. with_tools,
    with_reasoning: chats that offer tools, and that hold reasoning.
    """

    offsets: np.ndarray
    sizes: np.ndarray
    lines: np.ndarray
    hashes: np.ndarray
    label_ids: np.ndarray
    labels: tuple[str, ...]
    bad: tuple[BadRow, ...]
    bad_counts: dict[str, int]
    with_tools: int
    with_reasoning: int

    def __len__(self) -> int:
        return len(self.offsets)


def index_file(
    rows: RowFile,
    form: Format,
    settings: Settings,
    *,
    workers: int = 1,
    range_bytes: int = RANGE_BYTES,
    on_bytes: Callable[[int, int], None] | None = None,
) -> IndexedFile:
    """Index the file, or find its index in the cache.

    range_bytes: what one task scans. on_bytes: called with (bytes done, bytes in all).

    Raises DataError data-encoding, data-file-empty.
    """
    tree = {"version": INDEX_VERSION, "file": rows.content_hash, "mark": rows.mark, "form": _form_tree(form)}
    folder = settings.cache / "data" / "index" / hash_text(canonical_json(tree))[:40]
    if not folder.is_dir():
        size = rows.path.stat().st_size
        starts = range(rows.skip, size, range_bytes)
        tasks = [ScanTask(rows.path, start, min(start + range_bytes, size), rows.skip, form) for start in starts]

        def done(count: int) -> None:
            if on_bytes is not None:
                on_bytes(min(count * range_bytes, size), size)

        scans = run_tasks(tasks, workers=min(workers, os.cpu_count() or 1), on_done=done)
        with fresh_folder(folder) as aside:
            _write_index(aside, rows, scans)
    return IndexedFile(rows, form, folder)


def _form_tree(form: Format) -> dict[str, Any]:
    tree = asdict(form)
    del tree["reason"]
    return tree if form.name == "labelled" else tree | {"prompt": ""}


def sample_format(rows: RowFile, *, asked: str, columns: dict[str, str], prompt: str) -> Format:
    """Detect the format of a file from its first readable records. Raises DataError (see `detect_format`)."""
    sample: list[dict[str, Any]] = []
    first_line = 0
    broken = ""
    with rows.path.open("rb") as stream:
        stream.seek(rows.skip)
        for number, raw in enumerate(stream, start=1):
            if len(sample) == SAMPLE_ROWS or number > 10 * SAMPLE_ROWS:
                break
            if not raw.strip():
                continue
            first_line = first_line or number
            try:
                tree = orjson.loads(raw)
            except orjson.JSONDecodeError as error:
                broken = broken or f"{_original_line(rows, number)}: broken JSON: {error.msg}"
                _refuse_encoding(rows, raw, number)
                continue
            if isinstance(tree, dict):
                sample.append(tree)
    if not sample:
        raise _no_sample(rows, first_line, broken)
    return detect_format(sample, source=rows.name, asked=asked, columns=columns, prompt=prompt)


def _original_line(rows: RowFile, number: int) -> str:
    line = number if rows.lines is None else int(np.load(rows.lines, mmap_mode="r")[number - 1])
    return f"{rows.name}{rows.mark}{line}"


def _refuse_encoding(rows: RowFile, raw: bytes, number: int) -> None:
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        raise encoding_error(_original_line(rows, number), raw, error) from error


def _no_sample(rows: RowFile, first_line: int, broken: str) -> DataError:
    if broken:
        hint = "write one JSON object per line, or one array of objects"
        return DataError("data-json-broken", broken, hint=hint)
    if rows.bad:
        return bad_row_error(rows.name, rows.mark, rows.bad[0], further=sum(n for _, n in rows.bad_counts) - 1)
    if first_line:
        what = f"{_original_line(rows, first_line)}: the row is not an object"
        return DataError("data-row-shape", what, hint="write one JSON object per line")
    return DataError("data-file-empty", f"{rows.name}: the file holds no row", hint="give a file with at least one row")


def bad_row_error(name: str, mark: str, bad: BadRow, *, further: int) -> DataError:
    """The error that stops at a bad row, saying how many more there are."""
    more = f" ({further} further bad row{'s' if further > 1 else ''} in this file)" if further else ""
    return DataError(bad.code, f"{name}{mark}{bad.line}: {bad.reason}{more}", got=bad.got, hint=bad.hint)


def _write_index(folder: Path, rows: RowFile, scans: list[Scan]) -> None:
    labels: dict[str, int] = {}
    bad: list[BadRow] = []
    bad_counts: dict[str, int] = {}
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ARRAYS}
    first_line = 0
    for scan in scans:
        ids = np.array([labels.setdefault(label, len(labels)) for label in scan.labels] + [-1], dtype=np.int32)
        columns["offsets"].append(scan.offsets)
        columns["sizes"].append(scan.sizes)
        columns["lines"].append(scan.lines + first_line)
        columns["hashes"].append(scan.hashes)
        columns["label_ids"].append(ids[scan.label_ids])
        bad.extend(each._replace(line=each.line + first_line) for each in scan.bad)
        for code, count in scan.bad_counts.items():
            bad_counts[code] = bad_counts.get(code, 0) + count
        first_line += scan.line_count
    _refuse_bad_encoding(rows, bad, bad_counts)
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    if rows.lines is not None:
        original = np.load(rows.lines, mmap_mode="r")
        arrays["lines"] = original[arrays["lines"] - 1]
        bad = [each._replace(line=int(original[each.line - 1])) for each in bad]
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    meta = {"labels": list(labels), "bad": list(map(list, bad[:BAD_KEPT])), "bad_counts": bad_counts}
    meta["with_tools"] = sum(scan.with_tools for scan in scans)
    meta["with_reasoning"] = sum(scan.with_reasoning for scan in scans)
    (folder / "meta.json").write_bytes(orjson.dumps(meta))


def _refuse_bad_encoding(rows: RowFile, bad: list[BadRow], counts: dict[str, int]) -> None:
    # A wrong encoding is a matter of the whole file, not of some rows: no policy drops it.
    found = next((each for each in bad if each.code == "data-encoding"), None)
    if found is not None:
        raise bad_row_error(rows.name, rows.mark, found, further=counts["data-encoding"] - 1)


def load_table(indexed: IndexedFile) -> RowTable:
    """The arrays of an index, mapped from disk."""
    meta = orjson.loads((indexed.folder / "meta.json").read_bytes())
    arrays = {name: np.load(indexed.folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
    bad = sorted([*indexed.rows.bad, *(BadRow(*each) for each in meta["bad"])])
    bad_counts = dict(meta["bad_counts"])
    for code, count in indexed.rows.bad_counts:
        bad_counts[code] = bad_counts.get(code, 0) + count
    return RowTable(
        offsets=arrays["offsets"],
        sizes=arrays["sizes"],
        lines=arrays["lines"],
        hashes=arrays["hashes"],
        label_ids=arrays["label_ids"],
        labels=tuple(meta["labels"]),
        bad=tuple(bad),
        bad_counts=bad_counts,
        with_tools=meta["with_tools"],
        with_reasoning=meta["with_reasoning"],
    )


class RowReader:
    """Reads single rows of an indexed file; safe to use from several threads."""

    def __init__(self, indexed: IndexedFile) -> None:
        self.table = load_table(indexed)
        self._indexed = indexed
        self._convert = make_converter(indexed.form)
        self._file = indexed.rows.path.open("rb", buffering=0)

    def __len__(self) -> int:
        return len(self.table)

    def source(self, index: int) -> str:
        """Where row `index` came from: "file:line"."""
        return f"{self._indexed.rows.name}{self._indexed.rows.mark}{self.table.lines[index]}"

    def row(self, index: int) -> Row:
        """Row `index`. Raises DataError data-file-changed when the file is not what was indexed."""
        table = self.table
        source = self.source(index)
        raw = os.pread(self._file.fileno(), int(table.sizes[index]), int(table.offsets[index]))
        try:
            row = self._convert(orjson.loads(raw), source)
            same = row_hash(row) == int(table.hashes[index]).to_bytes(HASH_BYTES, "little")
        except (BadRowError, orjson.JSONDecodeError, AttributeError):
            same = False
            row = None
        if row is None or not same:
            raise DataError(
                "data-file-changed",
                f"{source}: the file was changed while it was in use",
                hint="leave data files alone during a run; start again to use the new contents",
            )
        return row

    def close(self) -> None:
        """Give the file back."""
        self._file.close()
