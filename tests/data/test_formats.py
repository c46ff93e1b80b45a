"""Formats are recognised by the names of fields, with the reason; what cannot be learnt from is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tenon.data.formats import LAYOUTS, Format, detect_format
from tenon.errors import DataError
from tenon.settings import Settings
from tests.data.build import index

ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": "user", "content": "hi"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "hi"}]},
    "alpaca": {"instruction": "say", "input": "", "output": "hi"},
    "prompt_completion": {"prompt": "a", "completion": "b"},
    "labelled": {"text": "a", "label": "b"},
    "text": {"text": "a"},
}


def _detect(tree: dict[str, Any], *, asked: str = "auto", columns: dict[str, str] | None = None) -> Format:
    return detect_format([tree], source="rows.jsonl", asked=asked, columns=columns or {}, prompt="{text}")


def _refusal(tree: dict[str, Any], **how: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        _detect(tree, **how)
    return caught.value


def test_every_format_is_recognised_by_its_own_fields() -> None:
    assert set(ROWS) == set(LAYOUTS)
    for name, tree in ROWS.items():
        form = _detect(tree)
        assert form.name == name
        assert form.reason.startswith("the rows have ")


@pytest.mark.parametrize(
    ("tree", "name", "columns"),
    [
        ({"sentence": "a", "intent": "b"}, "labelled", {"text": "sentence", "label": "intent"}),
        ({"text": "a", "category": "b"}, "labelled", {"text": "text", "label": "category"}),
        ({"conversations": [{"role": "user", "content": "x"}]}, "messages", {"messages": "conversations"}),
        ({"messages": [{"from": "human", "value": "x"}]}, "sharegpt", {"conversations": "messages"}),
        ({"conversation": [{"from": "human", "value": "x"}]}, "sharegpt", {"conversations": "conversation"}),
        ({"text": "a", "label": None}, "text", {"text": "text"}),
    ],
)
def test_other_names_of_the_same_fields(tree: dict[str, Any], name: str, columns: dict[str, str]) -> None:
    form = _detect(tree)
    assert (form.name, dict(form.columns)) == (name, columns)


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ({"prompt": "question", "completion": "answer"}, "prompt_completion"),
        ({"instruction": "question", "output": "answer"}, "alpaca"),
        ({"text": "question", "label": "answer"}, "labelled"),
        ({"text": "answer"}, "text"),
    ],
)
def test_mapped_columns_decide_the_format(columns: dict[str, str], name: str) -> None:
    form = _detect({"question": "a", "answer": "b"}, columns=columns)
    assert form.name == name
    assert {ours: form.columns[ours] for ours in columns} == columns
    assert "mapped by the recipe" in form.reason


def test_the_recipe_may_name_the_format() -> None:
    assert _detect(ROWS["labelled"], asked="text").name == "text"
    assert _detect(ROWS["labelled"], asked="labeled").name == "labelled"
    assert _detect(ROWS["prompt_completion"], asked="prompt-completion").reason == "the recipe says so"
    error = _refusal(ROWS["alpaca"], asked="alpacca")
    assert (error.code, error.hint) == ("data-format-name", "did you mean alpaca?")


def test_a_mapped_column_that_is_not_there_is_named() -> None:
    error = _refusal({"question": "a", "answer": "b"}, columns={"completion": "anwser"})
    assert (error.code, error.got, error.hint) == ("data-column-missing", "anwser", "did you mean answer?")


def test_a_field_that_the_format_does_not_have_is_refused() -> None:
    error = _refusal({"q": "a", "a": "b"}, asked="alpaca", columns={"instruction": "q", "output": "a", "inptu": "q"})
    assert (error.code, error.hint) == ("data-column-unknown", "did you mean input?")


def test_unknown_fields_are_listed() -> None:
    error = _refusal({"foo": 1, "bar": 2})
    assert (error.code, error.got) == ("data-format-unknown", "fields bar, foo")
    assert _refusal({"prompt": "a"}, asked="prompt_completion").code == "data-format-unknown"


@pytest.mark.parametrize(
    "tree",
    [
        {"conversations": [], "chosen": {}, "rejected": {}},
        {"chosen_messages": [], "rejected_messages": []},
        {"messages": [{"role": "user", "content": "x"}], "label": True},
        {"prompt": "a", "completion": "b", "label": False},
        {"instruction": "a", "output": "b", "kto_tag": True},
    ],
)
def test_preferences_are_refused(tree: Mapping[str, Any]) -> None:
    assert _refusal(dict(tree)).code == "data-preference"


def test_a_chosen_answer_may_be_mapped() -> None:
    form = _detect({"prompt": "a", "chosen": "b", "rejected": "c"}, columns={"completion": "chosen"})
    assert form.name == "prompt_completion"


DEMOS = {
    "alpaca_en_demo.json": ("alpaca", 999),
    "alpaca_zh_demo.json": ("alpaca", 1000),
    "identity.json": ("alpaca", 91),
    "glaive_toolcall_en_demo.json": ("sharegpt", 300),
    "reason_tool_use_demo_50.jsonl": ("messages", 50),
    "dpo_en_demo.json": ("data-preference", 0),
    "v1_dpo_demo.jsonl": ("data-preference", 0),
    "kto_en_demo.json": ("data-preference", 0),
}


def test_real_files_are_recognised_and_every_row_is_used(shared_data: Path, settings: Settings) -> None:
    from tenon.data.index import load_table

    files = {path.name for path in (shared_data / "demos").iterdir()}
    assert files == set(DEMOS)
    for name, (expected, rows) in DEMOS.items():
        path = shared_data / "demos" / name
        if rows:
            indexed = index(path, settings)
            table = load_table(indexed)
            assert (indexed.form.name, len(table), table.bad) == (expected, rows, ()), name
        else:
            with pytest.raises(DataError) as caught:
                index(path, settings)
            assert caught.value.code == expected, name


def test_real_tables_are_recognised(shared_data: Path, settings: Settings) -> None:
    from tenon.data.index import load_table

    banking = index(shared_data / "banking77" / "train.csv", settings)
    table = load_table(banking)
    assert (banking.form.name, len(table), len(table.labels)) == ("labelled", 10_003, 77)
    columns = {"prompt": "question", "completion": "answer"}
    sums = index(shared_data / "gsm8k" / "train.jsonl", settings, columns=columns)
    assert (sums.form.name, len(load_table(sums))) == ("prompt_completion", 7_473)
    with pytest.raises(DataError) as caught:
        index(shared_data / "gsm8k" / "train.jsonl", settings)
    assert caught.value.code == "data-format-unknown"
