"""What a GPU machine without network or tokenizer needs: rendered rows, a tokenizer's files, a base cut in pieces.

Run: python -m benchmarks.gpu.prepare --data FOLDER --out .peers
FOLDER holds banking77's train.csv and test.csv. Rows are rendered by Tenon's own renderer with SmolLM2's tokenizer,
its ids are below 65,536. The tokenizer's files go beside the random bases that peers load, who refuse a base without
one. The base is the embedded GGUF itself, cut in pieces that travel one by one: `gpu.sh` joins them there.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.gpu.rows import Row, write_rows
from benchmarks.gpu.works import REAL_ROWS
from tenon.bases.locate import locate_base
from tenon.data.render import Renderer
from tenon.data.rows import Chat
from tenon.data.tokenizer import load_tokenizer
from tenon.models.prepare import prepare_base
from tenon.settings import read_settings

BASE = "smollm2-135m"
PIECES = 2
PADDING = "<|endoftext|>"
# Sizes of a real model's folder that are no part of its tokenizer.
_WEIGHTS_AND_CONFIG = {"model.safetensors", "config.json", "generation_config.json"}


def main() -> None:
    """Write everything."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True, help="folder with train.csv and test.csv")
    parser.add_argument("--out", type=Path, default=Path(".peers"))
    a = parser.parse_args()
    settings = read_settings()
    location = locate_base(BASE, settings)
    folder = prepare_base(location, settings)
    renderer = Renderer(load_tokenizer(folder))
    parts = {part: render_csv(a.data / f"{part}.csv", renderer) for part in ("train", "test")}
    write_rows(a.out / REAL_ROWS, parts)
    copy_tokenizer(folder, a.out / "tokenizer")
    cut(location.path, a.out / "base", PIECES)
    for part, rows in parts.items():
        lengths = [len(row.ids) for row in rows]
        print(f"{part}: {len(rows)} rows of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all")


def render_csv(path: Path, renderer: Renderer) -> list[Row]:
    """The rows of a file with text and category, shuffled by a fixed seed."""
    with path.open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    random.Random(0).shuffle(table)
    rows = []
    for index, entry in enumerate(table):
        messages = ({"role": "user", "content": entry["text"]}, {"role": "assistant", "content": entry["category"]})
        rendered = renderer.render(Chat(messages, None, f"{path.name}:{index}"))
        rows.append(Row(np.array(rendered.ids), np.array(rendered.supervised, dtype=bool)))
    return rows


def copy_tokenizer(folder: Path, target: Path) -> None:
    """The small files of a base's folder that are not its configuration; a token of its own for padding, as some
    peers ask for.
    """
    target.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.name not in _WEIGHTS_AND_CONFIG:
            shutil.copy(file, target / file.name)
    config = target / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text("utf-8")), "pad_token": PADDING}, indent=2), "utf-8")


def cut(path: Path, folder: Path, pieces: int) -> Sequence[Path]:
    """The file's bytes in so many files of nearly equal size, 0, 1, …"""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    size = -(-path.stat().st_size // pieces)
    written = []
    with path.open("rb") as file:
        for number in range(pieces):
            written.append(folder / str(number))
            written[-1].write_bytes(file.read(size))
    return written


if __name__ == "__main__":
    main()
