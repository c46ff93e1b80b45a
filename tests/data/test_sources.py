"""Files behind a source's name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tenon.data.sources import find_files
from tenon.errors import DataError
from tenon.settings import Settings
from tests.data.build import write_jsonl


def _names(spec: Path | str, settings: Settings) -> list[str]:
    return [file.path.name for file in find_files(str(spec), settings)]


def _refusal(spec: Path | str, settings: Settings) -> DataError:
    with pytest.raises(DataError) as caught:
        find_files(str(spec), settings)
    return caught.value


def test_a_file_tells_its_kind_and_packing_by_its_suffixes(tmp_path: Path, settings: Settings) -> None:
    expected = {
        "a.jsonl": ("jsonl", ""),
        "a.JSON": ("json", ""),
        "a.ndjson.gz": ("jsonl", "gz"),
        "a.csv.bz2": ("csv", "bz2"),
        "a.tsv.xz": ("tsv", "xz"),
        "a.txt.zst": ("text", "zst"),
        "a.v2.parquet": ("parquet", ""),
    }
    for name, found in expected.items():
        (tmp_path / name).write_text("x")
        (file,) = find_files(str(tmp_path / name), settings)
        assert (file.kind, file.packing, file.name) == (*found, str(tmp_path / name))


def test_a_folder_gives_its_data_files_in_order_and_nothing_else(tmp_path: Path, settings: Settings) -> None:
    for name in ("b.jsonl", "a.csv", "deep/c.json", "README.md", ".hidden.jsonl", "_tmp/x.jsonl", "dataset_info.json"):
        write_jsonl(tmp_path / name, [1])
    assert _names(tmp_path, settings) == ["a.csv", "b.jsonl", "c.json"]


def test_a_glob_gives_what_it_matches(tmp_path: Path, settings: Settings) -> None:
    for name in ("train-2.jsonl", "train-1.jsonl", "test-1.jsonl", "deep/train-3.jsonl"):
        write_jsonl(tmp_path / name, [1])
    assert _names(tmp_path / "train-*.jsonl", settings) == ["train-1.jsonl", "train-2.jsonl"]
    assert _names(tmp_path / "**/train-*.jsonl", settings) == ["train-3.jsonl", "train-1.jsonl", "train-2.jsonl"]


def test_a_missing_file_is_named_with_the_nearest_one(tmp_path: Path, settings: Settings) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [1])
    error = _refusal(tmp_path / "row.jsonl", settings)
    assert error.code == "data-file-missing"
    assert error.hint == f"did you mean {tmp_path / 'rows.jsonl'}?"
    assert _refusal(tmp_path / "*.csv", settings).code == "data-file-missing"


def test_an_unknown_suffix_is_refused(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "rows.docx").write_text("x")
    error = _refusal(tmp_path / "rows.docx", settings)
    assert (error.code, error.got) == ("data-file-kind", ".docx")


def test_an_empty_folder_is_refused(tmp_path: Path, settings: Settings) -> None:
    assert _refusal(tmp_path, settings).code == "data-folder-empty"


def test_a_folder_of_train_and_test_files_is_not_read_as_one(tmp_path: Path, settings: Settings) -> None:
    write_jsonl(tmp_path / "data/train-00.jsonl", [1])
    write_jsonl(tmp_path / "data/test-00.jsonl", [1])
    error = _refusal(tmp_path, settings)
    assert error.code == "data-folder-splits"
    assert "test, train" in error.what
    assert _names(tmp_path / "data/train*.jsonl", settings) == ["train-00.jsonl"]


@pytest.mark.parametrize("spec", ["someone/some-set", "hf://someone/some-set", "hf://someone/some-set/data/*.parquet"])
def test_the_hub_is_not_asked_offline(spec: str, settings: Settings) -> None:
    assert _refusal(spec, settings).code == "data-hub-offline"


def test_a_name_that_no_hub_could_have_is_refused_without_asking(settings: Settings) -> None:
    error = _refusal("hf://..--..", replace(settings, offline=False))
    assert error.code == "data-hub-missing"
