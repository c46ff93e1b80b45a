"""Reads one file of any supported kind as a stream of raw records: CSV, TSV, JSON arrays, Parquet, text, packed or not.

Plain JSONL is not read here: it is indexed in place (`index.py`). This module does not know what records mean.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import orjson

from tenon.data.arrays import ArrayScanner, Element
from tenon.data.sources import SourceFile
from tenon.errors import DataError

CHUNK_BYTES = 4 << 20
LONGEST_FIELD_CHARS = 1 << 30
UTF8_BOM = b"\xef\xbb\xbf"
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
ENCODING_HINT = "save the file as UTF-8, as in: iconv -f LATIN1 -t UTF-8 IN > OUT"


class Record(NamedTuple):
    """One raw record: the line (or row, from 1) where it begins, and its tree; or why it cannot be read."""

    line: int
    tree: dict[str, Any] | None
    code: str = ""
    reason: str = ""
    got: str = ""


class ByteStream(Protocol):
    """What readers need of an open file."""

    def read(self, size: int, /) -> bytes: ...


@contextmanager
def open_bytes(file: SourceFile) -> Iterator[ByteStream]:
    """The unpacked bytes of a file. Raises DataError data-packed-broken when unpacking fails within the block."""
    try:
        if file.packing == "zst":
            # pyarrow is slow to import; only Zstandard and Parquet need it.
            import pyarrow

            with pyarrow.input_stream(str(file.path), compression="zstd") as stream:
                yield stream
        else:
            openers = {"": open, "gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}
            with openers[file.packing](file.path, "rb") as stream:
                yield stream
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise _packed_broken(file, error) from error
    except OSError as error:
        # bz2 and pyarrow say plain OSError (without errno) for damaged data; the rest is the system's.
        if file.packing and error.errno is None:
            raise _packed_broken(file, error) from error
        raise


def _packed_broken(file: SourceFile, error: Exception) -> DataError:
    return DataError(
        "data-packed-broken",
        f"{file.name}: the file cannot be unpacked: {error}",
        hint=f"the file is damaged or is no .{file.packing}; copy it again",
    )


def read_head(file: SourceFile, size: int = 4096) -> bytes:
    """The first unpacked bytes, without a UTF-8 byte-order mark.

    Raises DataError: data-file-empty, data-encoding, data-packed-broken.
    """
    with open_bytes(file) as stream:
        head = stream.read(size)
    if head.startswith(UTF16_BOMS):
        raise DataError("data-encoding", f"{file.name}:1: the file is UTF-16, not UTF-8", hint=ENCODING_HINT)
    head = head.removeprefix(UTF8_BOM)
    if not head:
        raise empty_file(file)
    return head


def empty_file(file: SourceFile, what: str = "the file is empty") -> DataError:
    """The error for a file without rows."""
    return DataError("data-file-empty", f"{file.name}: {what}", hint="give a file with at least one row")


def read_records(file: SourceFile, kind: str) -> Iterator[Record]:
    """Every record of a csv, tsv, json, parquet or text file, in order."""
    if kind == "parquet":
        yield from _parquet_records(file)
        return
    with open_bytes(file) as stream:
        if kind == "json":
            yield from _array_records(file, stream)
        elif kind == "text":
            yield from _text_records(file, stream)
        else:
            yield from _table_records(file, stream, kind)


def _lines(file: SourceFile, stream: ByteStream) -> Iterator[str]:
    """Decoded lines with their ends; only \\n ends a line."""
    rest, number = b"", 0
    first = True
    while chunk := stream.read(CHUNK_BYTES):
        if first:
            chunk, first = chunk.removeprefix(UTF8_BOM), False
        parts = (rest + chunk).split(b"\n")
        rest = parts.pop()
        for part in parts:
            number += 1
            yield _decode(file, part, number) + "\n"
    if rest:
        yield _decode(file, rest, number + 1)


def _decode(file: SourceFile, line: bytes, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise encoding_error(f"{file.name}:{number}", line, error) from error


def encoding_error(source: str, line: bytes, error: UnicodeDecodeError) -> DataError:
    """The error for bytes that are not UTF-8, naming the first of them."""
    return DataError(
        "data-encoding",
        f"{source}: the line is not UTF-8",
        got=f"byte 0x{line[error.start]:02x} at column {error.start + 1}",
        hint=ENCODING_HINT,
    )


def _text_records(file: SourceFile, stream: ByteStream) -> Iterator[Record]:
    for number, line in enumerate(_lines(file, stream), start=1):
        if line.strip():
            yield Record(number, {"text": line.rstrip("\r\n")})


def _table_records(file: SourceFile, stream: ByteStream, kind: str) -> Iterator[Record]:
    # The module's limit of 128 KiB a field is for the whole process; long documents are ordinary here.
    csv.field_size_limit(LONGEST_FIELD_CHARS)
    lines = _lines(file, stream)
    first = next(lines, "")
    delimiter = "\t" if kind == "tsv" else ";" if ";" in first and "," not in first else ","
    reader = csv.reader(_chain(first, lines), delimiter=delimiter, strict=True)
    start = 1
    header: list[str] | None = None
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                "data-csv-broken",
                f"{file.name}:{start}: the record cannot be read: {error}",
                hint='close the quotes, and write a quote inside a field twice ("")',
            ) from error
        line, start = start, reader.line_num + 1
        if not cells:
            continue
        if header is None:
            header = _checked_header(file, cells)
        elif len(cells) == len(header):
            yield Record(line, dict(zip(header, cells, strict=True)))
        else:
            reason = f"the row has {len(cells)} fields, the header {len(header)}"
            yield Record(line, None, "data-csv-ragged", reason, delimiter.join(cells)[:80])


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    if first:
        yield first
    yield from rest


def _checked_header(file: SourceFile, cells: list[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled or "" in header:
        raise DataError(
            "data-csv-header",
            f"{file.name}:1: the header must name each column once",
            got=", ".join(doubled) or "an empty name",
            hint="the first line names the columns, as in: text,label",
        )
    return header


def _array_records(file: SourceFile, stream: ByteStream) -> Iterator[Record]:
    scanner = ArrayScanner(file.name)
    first = stream.read(CHUNK_BYTES).removeprefix(UTF8_BOM)
    for element in scanner.feed(first):
        yield _array_record(file, element)
    while chunk := stream.read(CHUNK_BYTES):
        for element in scanner.feed(chunk):
            yield _array_record(file, element)
    for element in scanner.finish():
        yield _array_record(file, element)


def _array_record(file: SourceFile, element: Element) -> Record:
    try:
        tree = orjson.loads(element.raw)
    except orjson.JSONDecodeError as error:
        _decode(file, element.raw, element.line)
        line = element.line + error.doc.count("\n", 0, error.pos)
        return Record(line, None, "data-json-broken", f"broken JSON: {error.msg}", snippet(element.raw))
    if not isinstance(tree, dict):
        return Record(element.line, None, "data-row-shape", "the row is not an object", snippet(element.raw))
    return Record(element.line, tree)


def snippet(raw: bytes) -> str:
    """The beginning of a row for a message."""
    text = raw.decode(errors="replace").strip()
    return text if len(text) <= 80 else text[:77] + "…"


def _parquet_records(file: SourceFile) -> Iterator[Record]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file.path) as table:
            number = 0
            for batch in table.iter_batches(batch_size=1024):
                for tree in batch.to_pylist():
                    number += 1
                    yield Record(number, tree)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(
            "data-parquet-broken",
            f"{file.name}: the file is no readable Parquet: {str(error).splitlines()[0]}",
            hint="make or copy the file again",
        ) from error
