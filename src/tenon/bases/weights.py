"""The weight files of a folder base: which there are, and whether each is whole, judged by its header alone.

The layout of a safetensors file: 8 bytes little-endian header length, a JSON header {name: {dtype, shape,
data_offsets: [begin, end]}}, the data. This module decodes no tensor.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenon.errors import BaseModelError

INDEX = "model.safetensors.index.json"
_HEADER_LIMIT_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor of a safetensors file. begin, end: byte offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files that hold a folder's weights, in the index's order.

    Raises: BaseModelError base-not-a-model, base-shard-missing, base-damaged.
    """
    index = folder / INDEX
    if index.is_file():
        return _indexed_files(index)
    if (folder / "model.safetensors").is_file():
        return (folder / "model.safetensors",)
    raise _no_weights(folder)


def check_weights(folder: Path) -> None:
    """Refuse a folder that is no model or whose weight files are not whole.

    Raises: BaseModelError base-not-a-model, base-empty, base-shard-missing, base-damaged.
    """
    if not any(folder.iterdir()):
        raise BaseModelError(
            "base-empty", f"{folder} is empty", hint="give a folder with config.json and *.safetensors"
        )
    if not (folder / "config.json").is_file():
        raise _no_config(folder)
    for file in weight_files(folder):
        read_header(file)


def read_header(file: Path) -> tuple[TensorHeader, ...]:
    """The tensors of one safetensors file, in the order of their data. Raises base-empty, base-damaged."""
    size_bytes = file.stat().st_size
    if size_bytes == 0:
        raise BaseModelError("base-empty", f"{file} is empty", hint="download the file again")
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if size_bytes < 8 + header_bytes or header_bytes > _HEADER_LIMIT_BYTES:
            raise _damaged(file, "its header is cut off or is none", f"{size_bytes} bytes")
        text = stream.read(header_bytes)
    try:
        tree = json.loads(text)
        tensors = [_tensor(name, entry, 8 + header_bytes) for name, entry in tree.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(file, "its header is not that of a safetensors file", str(error)[:100]) from error
    tensors.sort(key=lambda tensor: tensor.begin)
    for tensor in tensors:
        if tensor.end > size_bytes:
            raise _damaged(file, f"it ends inside the tensor {tensor.name}", f"{size_bytes} bytes")
    return tuple(tensors)


def _tensor(name: str, entry: dict[str, Any], start: int) -> TensorHeader:
    begin, end = entry["data_offsets"]
    return TensorHeader(name, entry["dtype"], tuple(entry["shape"]), start + begin, start + end)


def _indexed_files(index: Path) -> tuple[Path, ...]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
        names = list(dict.fromkeys(weight_map.values()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(index, "it holds no weight_map", str(error)[:100]) from error
    if not names or any(Path(name).name != name for name in names):
        raise _damaged(index, "it must name files of its own folder", ", ".join(names)[:100])
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise BaseModelError(
            "base-shard-missing",
            f"{index} names weight files that are not there",
            got=", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else ""),
            hint="download the folder again, whole",
        )
    return tuple(index.parent / name for name in names)


def _damaged(file: Path, why: str, got: str) -> BaseModelError:
    return BaseModelError("base-damaged", f"{file} is damaged: {why}", got=got, hint="download the file again")


def _no_config(folder: Path) -> BaseModelError:
    if (folder / "adapter_config.json").is_file():
        return BaseModelError(
            "base-not-a-model",
            f"{folder} holds an adapter, not a base",
            hint="give the base that adapter_config.json names in base_model_name_or_path",
        )
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        return BaseModelError(
            "base-not-a-model",
            f"{folder} has no config.json, but GGUF files",
            got=", ".join(file.name for file in ggufs[:3]),
            hint=f"give the file itself: {ggufs[0]}",
        )
    return BaseModelError(
        "base-not-a-model",
        f"{folder} is no model: it has no config.json",
        hint="give a folder with config.json and *.safetensors, or a .gguf file",
    )


def _no_weights(folder: Path) -> BaseModelError:
    pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickles:
        return BaseModelError(
            "base-not-a-model",
            f"{folder} has pickled weights alone, which Tenon never opens",
            got=pickles[0].name,
            hint="get a version with model.safetensors, or save it again with save_pretrained of transformers",
        )
    return BaseModelError(
        "base-not-a-model",
        f"{folder} has no weights: neither model.safetensors nor {INDEX}",
        hint="give a folder with config.json and *.safetensors, or a .gguf file",
    )
