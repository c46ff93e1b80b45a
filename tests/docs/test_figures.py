"""Every figure in README and docs is what the result files say, in both languages alike."""

from __future__ import annotations

import json

import pytest

from benchmarks.quote import DOCUMENTS, figure, quoted
from benchmarks.report import REPOSITORY, RESULTS


@pytest.mark.parametrize("name", DOCUMENTS)
def test_quoted_figures_are_those_of_the_result_files(name: str) -> None:
    for result, what, form, text in quoted(REPOSITORY / name):
        assert text == figure(result, what, form), f"{name}: {result} | {what}: run python -m benchmarks.quote"


def test_both_readmes_quote_the_same_figures() -> None:
    english, chinese = (quoted(REPOSITORY / name) for name in ("README.md", "README.zh-CN.md"))
    assert len(english) >= 10
    assert sorted(english) == sorted(chinese)


def test_result_files_have_the_agreed_form() -> None:
    files = sorted(RESULTS.glob("*.json"))
    assert len(files) >= 6
    for path in files:
        tree = json.loads(path.read_text("utf-8"))
        common = {"name", "device", "date", "commit", "versions", "rows"}
        assert set(tree) >= common, path.name
        # Those of GPUs, which are measured over several calls, keep every repetition beside the rows.
        assert set(tree) == common or path.name.startswith(("gpu_", "serve_gpu")), path.name
        assert tree["name"] == path.stem
        for row in tree["rows"]:
            assert set(row) == {"what", "value", "unit", "bound", "met"}, path.name


def test_no_placeholder_is_left() -> None:
    for name in DOCUMENTS:
        text = (REPOSITORY / name).read_text("utf-8")
        assert "{{" not in text and "TODO" not in text, name
