"""Ours and the peers take the same tokens: rows in a small file, drawn windows, padded and packed batches."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from benchmarks.gpu.rows import Row, read_rows, write_rows
from benchmarks.gpu.works import Peer, Shape, Spec, peer_spec
from benchmarks.ours.step import deal, windows
from benchmarks.report import REPOSITORY

VOCAB = 97


def peers() -> ModuleType:
    """The peers' script, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("lora_step", REPOSITORY / "benchmarks" / "peers" / "lora_step.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Twenty rows of 3 to 12 tokens, the last tokens supervised."""
    draw = np.random.default_rng(0)
    rows = []
    for length in draw.integers(3, 13, 20):
        supervised = np.arange(length) >= length - 2
        rows.append(Row(draw.integers(0, 50_000, length), supervised))
    write_rows(tmp_path / "rows.npz", {"train": rows, "test": rows[:2]})
    return tmp_path / "rows.npz"


def spec(rows: int, row_tokens: int, rows_file: str = "", layout: str = "padded") -> Spec:
    """A tiny spec with a peer."""
    shape = asdict(Shape("tiny", 2, 32, 4, 2, 48, VOCAB, tied_head=True))
    ours = Spec(shape, "bf16", rows, row_tokens, (4,), steps=3, warm=1, device="cpu", rows_file=rows_file)
    return peer_spec(ours, Peer("PEFT", "peft", "none", layout), "")  # pyright: ignore[reportArgumentType]


def test_rows_come_back(rows_file: Path) -> None:
    rows = read_rows(rows_file, "train")
    assert len(rows) == 20 and len(read_rows(rows_file, "test")) == 2
    assert all(row.supervised.sum() == 2 and row.ids.dtype == np.int64 for row in rows)
    with pytest.raises(ValueError, match="does not fit two bytes"):
        write_rows(rows_file, {"train": [Row(np.array([70_000]), np.array([True]))]})


def test_drawn_windows_are_the_peers() -> None:
    ours, (theirs, tokens) = windows(spec(4, 8)), peers().batches(asdict(spec(4, 8)))
    assert len(ours) == len(theirs) == 4 and tokens == [32] * 4
    for window, batch in zip(ours, theirs, strict=True):
        assert (np.stack([row.ids for row in window]) == batch["input_ids"]).all()
        assert all(row.supervised.all() for row in window) and (batch["labels"] == batch["input_ids"]).all()


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_real_windows_are_the_peers(rows_file: Path, layout: str) -> None:
    taken = spec(6, 0, str(rows_file), layout)
    ours, (theirs, tokens) = windows(taken), peers().batches(asdict(taken))
    assert tokens == [sum(len(row.ids) for row in window) for window in ours]
    for window, batch in zip(ours, theirs, strict=True):
        ids = np.concatenate([row.ids for row in window])
        real = batch["attention_mask"] == 1 if layout == "padded" else np.ones_like(batch["input_ids"], dtype=bool)
        assert (batch["input_ids"][real] == ids).all() and ids.max() < VOCAB
        # What the model learns: each label is the id at its own place, predicted from the one before.
        supervised = np.concatenate([np.where(row.supervised, row.ids, -100) for row in window])
        assert (batch["labels"][real] == supervised).all() and (batch["labels"][~real] == -100).all()
        if layout == "packed":
            starts = np.cumsum([0, *(len(row.ids) for row in window[:-1])])
            assert (batch["position_ids"][0][starts] == 0).all() and (batch["position_ids"] == 0).sum() == len(window)


def test_rows_are_dealt_to_slots_in_turn() -> None:
    rows = [Row(np.arange(3), np.ones(3, dtype=bool)) for _ in range(5)]
    assert [row.slot for row in deal(rows, 2)] == [0, 1, 0, 1, 0]
