"""Counting rows and guessing tokens before anything is tokenised."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tenon.bases.locate import locate_base
from tenon.data.tokenizer import load_tokenizer
from tenon.errors import DataError
from tenon.models.prepare import prepare_base
from tenon.recipe.load import parse_recipe
from tenon.service.sizing import guess_tokens, measure_data
from tenon.settings import Settings


def measure(folder: Path, settings: Settings, data: str):
    loaded = parse_recipe(f"base: x\ndata:\n{data}", file=folder / "r.yaml", working_folder=folder)
    return measure_data(loaded, settings)


def write_rows(path: Path, count: int) -> None:
    rows = [json.dumps({"prompt": f"question {n}", "completion": f"answer {n}"}) for n in range(count)]
    text = "\n".join(rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def test_rows_are_counted_weights_and_validation_too(tmp_path: Path, settings: Settings) -> None:
    for name, count in (("a.jsonl", 1000), ("b.jsonl.gz", 100), ("v.jsonl", 30)):
        write_rows(tmp_path / name, count)
    size = measure(
        tmp_path, settings,
        "  train:\n  - a.jsonl\n  - path: b.jsonl.gz\n    weight: 2\n  validation: v.jsonl\n",
    )  # fmt: skip
    assert (size.rows, size.validation_rows, size.exact) == (1200, 30, False)
    assert 15 < size.mean_tokens < 40


def test_a_missing_source_is_named(tmp_path: Path, settings: Settings) -> None:
    with pytest.raises(DataError) as error:
        measure(tmp_path, settings, "  train: absent.jsonl\n")
    assert error.value.code == "data-file-missing"


def test_a_broken_line_is_left_to_training(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{broken\n')
    assert measure(tmp_path, settings, "  train: a.jsonl\n").rows == 2


@pytest.mark.parametrize("name", ["alpaca_en_demo.json", "alpaca_zh_demo.json"])
def test_the_guess_is_within_a_factor_of_the_truth(name: str, shared_data: Path, settings: Settings) -> None:
    """The guess must do for both scripts; the small base's vocabulary splits Chinese finely, others do not."""
    tokenizer = load_tokenizer(prepare_base(locate_base("smollm2-135m", settings), settings))
    rows = json.loads((shared_data / "demos" / name).read_text())[:200]
    truth = sum(len(tokenizer.encode(text)) for row in rows for text in row.values() if text)
    guess = sum(guess_tokens(row) for row in rows)
    assert truth / 2.5 < guess < truth * 2.5
