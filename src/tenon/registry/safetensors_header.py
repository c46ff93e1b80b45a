"""The header of a safetensors file, read and checked in plain Python: names, dtypes, shapes, and where the bytes lie.

Stricter than a reader must be: the tensors fill the file without holes or overlaps, so nothing can hide in it.
Source: https://github.com/huggingface/safetensors#format. This module does not know what the tensors are for.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

# 60,000 tensors with long names stay below this; the format itself would allow 100 MB.
MAX_HEADER_BYTES = 32_000_000
# dtype -> bytes each, mask of the exponent's bits (all set: infinite or not a number).
FLOATS: dict[str, tuple[int, int]] = {
    "F64": (8, 0x7FF0_0000_0000_0000),
    "F32": (4, 0x7F80_0000),
    "F16": (2, 0x7C00),
    "BF16": (2, 0x7F80),
}
_CHUNK_VALUES = 1 << 22


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """One tensor: dtype as the file spells it, shape, and its bytes [start, stop) from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, TensorFacts]:
    """Name -> tensor, in order of their bytes. Raises ValueError, saying what is not quite right."""
    with path.open("rb") as file:
        return parse_header(file, path.stat().st_size)


def parse_header(file: BinaryIO, size_bytes: int) -> dict[str, TensorFacts]:
    """`read_header` of an open file, or of its content in memory; no more than the header is read."""
    length = int.from_bytes(file.read(8), "little")
    if size_bytes < 8 or length > size_bytes - 8:
        raise ValueError(f"it is cut short: {size_bytes:,} bytes cannot hold its header")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header of {length:,} bytes is longer than {MAX_HEADER_BYTES:,}")
    raw = file.read(length)
    try:
        tree = json.loads(raw, object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is no JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError("its header is no JSON object")
    tree.pop("__metadata__", None)
    tensors = {name: _tensor(name, facts, 8 + length) for name, facts in tree.items()}
    return _without_holes(tensors, 8 + length, size_bytes)


def first_not_finite(content: Path | bytearray, tensors: dict[str, TensorFacts]) -> str | None:
    """The name of the first tensor that holds NaN or infinity, or None. content: the file, or what it holds."""
    import numpy as np

    for name, facts in tensors.items():
        width, mask = FLOATS[facts.dtype]
        kind, count = f"<u{width}", math.prod(facts.shape)
        if isinstance(content, Path):
            bits = np.memmap(content, dtype=kind, mode="r", offset=facts.start, shape=(count,))
        else:
            bits = np.frombuffer(content, dtype=kind, offset=facts.start, count=count)
        for start in range(0, bits.size, _CHUNK_VALUES):
            if bool(((bits[start : start + _CHUNK_VALUES] & mask) == mask).any()):
                return name
    return None


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("a name occurs twice")
    return tree


def _tensor(name: str, facts: Any, data_start: int) -> TensorFacts:
    if not isinstance(facts, dict) or set(facts) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the header's entry for {name} is malformed")
    dtype, shape, offsets = facts["dtype"], facts["shape"], facts["data_offsets"]
    if dtype not in FLOATS:
        raise ValueError(f"tensor {name} is of type {dtype!r}; only {', '.join(FLOATS)} are adapter weights")
    if not _counts(shape) or 0 in shape:
        raise ValueError(f"tensor {name} has the shape {shape!r}")
    if not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name} has the offsets {offsets!r}")
    if offsets[1] - offsets[0] != math.prod(shape) * FLOATS[dtype][0]:
        raise ValueError(f"tensor {name} of shape {shape} and type {dtype} does not fill its bytes")
    return TensorFacts(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _counts(numbers: Any) -> bool:
    """Whether it is a list of whole numbers from 0 on. (JSON's true is an int to Python.)"""
    return isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)


def _without_holes(tensors: dict[str, TensorFacts], data_start: int, size_bytes: int) -> dict[str, TensorFacts]:
    ordered = dict(sorted(tensors.items(), key=lambda item: item[1].start))
    end = data_start
    for name, facts in ordered.items():
        if facts.start != end:
            raise ValueError(f"tensor {name} does not begin where the one before ends")
        end = facts.stop
    if end > size_bytes:
        raise ValueError(f"it is cut short: {size_bytes:,} bytes instead of {end:,}")
    if end < size_bytes:
        raise ValueError(f"{size_bytes - end:,} bytes at its end belong to no tensor")
    return ordered
