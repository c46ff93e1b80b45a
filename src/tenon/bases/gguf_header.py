"""The header of a GGUF file: its key/value metadata and its table of tensors, memory-mapped, nothing decoded.

Layout (version 2 and 3, little-endian): magic, u32 version, u64 tensors, u64 pairs; the pairs (key, type, value); the
tensors (name, dimensions fastest first, type, offset); padding to `general.alignment`; the data.
Source: the GGUF specification of ggml. This module does not know architectures.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tenon.errors import BaseModelError

MAGIC = b"GGUF"
# type: (name, elements of a block, bytes of a block). Types that are absent are refused by number.
TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
}
_SCALARS: dict[int, struct.Struct] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_STRING, _ARRAY = 8, 9
_U32, _U64 = _SCALARS[4], _SCALARS[10]

Scalar = str | int | float | bool


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor. shape: slowest dimension first, as numpy and torch count. begin, end: byte offsets in the file."""

    name: str
    type_name: str
    type_id: int
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says of itself: single values, arrays, and tensors by name."""

    path: Path
    values: dict[str, Scalar]
    arrays: dict[str, tuple[Scalar, ...]]
    tensors: dict[str, GgufTensor]

    def text(self, key: str, default: str = "") -> str:
        """A string value, or the default."""
        return str(self.values.get(key, default))

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number above zero; without a default it must be there. Raises BaseModelError base-damaged."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise _damaged(self.path, f"{key} must be a whole number above 0", repr(value))
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number. Raises BaseModelError base-damaged."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise _damaged(self.path, f"{key} must be a number", repr(value))
        return float(value)


def read_gguf(path: Path) -> GgufHeader:
    """Read the header. Raises BaseModelError base-empty, base-damaged, base-unsupported (version, tensor type)."""
    if path.stat().st_size == 0:
        raise BaseModelError("base-empty", f"{path} is empty", hint="download the file again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _Reader(path, data).header()
        except (struct.error, UnicodeDecodeError, IndexError, OverflowError) as error:
            raise _damaged(path, "its header is cut off or is none") from error


class _Reader:
    """Walks the header from front to back; every read is bounded by the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def header(self) -> GgufHeader:
        if self.data[:4] != MAGIC:
            raise _damaged(self.path, "it does not begin as a GGUF file does", repr(self.data[:4]))
        self.at = 4
        version = self._number(_U32)
        if version not in (2, 3):
            self._unsupported("GGUF version", str(version))
        tensor_count, pair_count = self._number(_U64), self._number(_U64)
        values: dict[str, Scalar] = {}
        arrays: dict[str, tuple[Scalar, ...]] = {}
        for _ in range(pair_count):
            key, kind = self._string(), self._number(_U32)
            if kind == _ARRAY:
                arrays[key] = self._array()
            else:
                values[key] = self._value(kind)
        infos = [self._tensor_info() for _ in range(tensor_count)]
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise _damaged(self.path, "general.alignment is no positive number", repr(alignment))
        start = -(-self.at // alignment) * alignment
        tensors = [self._tensor(name, shape, kind, start + offset) for name, shape, kind, offset in infos]
        return GgufHeader(self.path, values, arrays, {tensor.name: tensor for tensor in tensors})

    def _number(self, kind: struct.Struct) -> int:
        (value,) = kind.unpack_from(self.data, self.at)
        self.at += kind.size
        return value

    def _string(self) -> str:
        length = self._number(_U64)
        start, self.at = self.at, self.at + length
        if self.at > len(self.data):
            raise _damaged(self.path, "its header is cut off or is none")
        return self.data[start : self.at].decode()

    def _value(self, kind: int) -> Scalar:
        if kind == _STRING:
            return self._string()
        if kind not in _SCALARS:
            raise _damaged(self.path, "its metadata holds a value of unknown type", str(kind))
        return self._number(_SCALARS[kind])

    def _array(self) -> tuple[Scalar, ...]:
        kind, count = self._number(_U32), self._number(_U64)
        if kind in _SCALARS:
            values = struct.Struct(f"<{count}{_SCALARS[kind].format[1:]}").unpack_from(self.data, self.at)
            self.at += count * _SCALARS[kind].size
            return values
        if kind == _STRING:
            return tuple(self._string() for _ in range(count))
        raise _damaged(self.path, "its metadata holds an array of unknown type", str(kind))

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dims = self._string(), self._number(_U32)
        fastest_first = [self._number(_U64) for _ in range(dims)]
        return name, tuple(reversed(fastest_first)), self._number(_U32), self._number(_U64)

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, begin: int) -> GgufTensor:
        if kind not in TENSOR_TYPES:
            self._unsupported(f"the type of tensor {name}", str(kind))
        type_name, block, block_bytes = TENSOR_TYPES[kind]
        elements = math.prod(shape)
        end = begin + elements // block * block_bytes
        if not shape or shape[-1] % block:
            raise _damaged(self.path, f"the shape of tensor {name} does not fit its type {type_name}", str(shape))
        if end > len(self.data):
            raise _damaged(self.path, f"it ends inside the tensor {name}", f"{len(self.data)} bytes")
        return GgufTensor(name, type_name, kind, shape, begin, end)

    def _unsupported(self, what: str, got: str) -> NoReturn:
        raise BaseModelError(
            "base-unsupported",
            f"{self.path}: Tenon does not read {what}",
            got=got,
            hint="use a GGUF file of version 3 in one of the types F32, F16, BF16, Q8_0, Q4_0 … Q6_K",
        )


def _damaged(path: Path, why: str, got: str = "") -> BaseModelError:
    return BaseModelError("base-damaged", f"{path} is damaged: {why}", got=got, hint="download the file again")
