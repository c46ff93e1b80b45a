"""What disks and people do to a registered version, each by its name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from tenon.registry.entry import Entry
from tenon.registry.safetensors_header import MAX_HEADER_BYTES
from tenon.runs.checkpoints import FileFacts, hash_file

WEIGHTS = "adapter_model.safetensors"


def rehash(folder: Path) -> None:
    """Let the entry say what the files now hold."""
    entry = Entry.from_json((folder / "tenon.json").read_bytes())
    files = {
        name: FileFacts(sha256=hash_file(folder / name), size_bytes=(folder / name).stat().st_size)
        for name in entry.files
    }
    (folder / "tenon.json").write_text(entry.model_copy(update={"files": files}).to_json())


def _truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def _flipped(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 0x40
    (folder / WEIGHTS).write_bytes(bytes(data))


def _link(folder: Path) -> None:
    elsewhere = folder.parent.parent.parent / f"elsewhere-{folder.parent.name}"
    shutil.move(folder / WEIGHTS, elsewhere)
    (folder / WEIGHTS).symlink_to(elsewhere)


def _pipe(folder: Path) -> None:
    """Opening one waits for a writer, unless it is asked not to."""
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def _header(folder: Path, *, says: int, blanks: int = 0) -> None:
    """The length of its header is a lie, or true and beyond what is read."""
    rest = b" " * blanks or (folder / WEIGHTS).read_bytes()[8:]
    (folder / WEIGHTS).write_bytes(says.to_bytes(8, "little") + rest)
    rehash(folder)


def _torch_saved(folder: Path) -> None:
    """A pickle under the name of the real thing."""
    torch.save({"x": torch.zeros(1)}, folder / WEIGHTS)
    rehash(folder)


def _value(folder: Path, *, value: float) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[min(tensors)][0, 0] = value
    save_file(tensors, folder / WEIGHTS)
    rehash(folder)


def _missing(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors[min(tensors)]
    save_file(tensors, folder / WEIGHTS)
    rehash(folder)


def _shape(folder: Path) -> None:
    """Whole and well formed, but of another base than it says."""
    tensors = {
        name: np.ascontiguousarray(t[:, :-8] if "lora_A" in name else t)
        for name, t in load_file(folder / WEIGHTS).items()
    }
    save_file(tensors, folder / WEIGHTS)
    rehash(folder)


def _config(folder: Path, *, change: dict[str, Any]) -> None:
    """What LoRA configurations may ask for and an adapter here cannot have."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    rehash(folder)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": _truncated,
    "flipped": _flipped,
    "vanished": lambda folder: (folder / WEIGHTS).unlink(),
    "link": _link,
    "entry": lambda folder: (folder / "tenon.json").write_text("{}"),
    "pickle": lambda folder: (folder / "adapter_model.bin").write_bytes(b"\x80\x04."),
    "nan": partial(_value, value=np.nan),
    "infinite": partial(_value, value=np.inf),
    "shape": _shape,
    "pipe": _pipe,
    "header": partial(_header, says=1 << 62),
    "long-header": partial(_header, says=MAX_HEADER_BYTES + 1, blanks=MAX_HEADER_BYTES + 8),
    "torch-saved": _torch_saved,
    "missing": _missing,
    "dora": partial(_config, change={"use_dora": True}),
    "saved-modules": partial(_config, change={"modules_to_save": ["lm_head"]}),
    "unknown-target": partial(_config, change={"target_modules": ["q_proj", "conv"]}),
    "other-kind": partial(_config, change={"peft_type": "IA3"}),
    "rank": partial(_config, change={"r": 3}),
}
