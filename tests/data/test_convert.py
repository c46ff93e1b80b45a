"""From records to rows, format by format."""

from __future__ import annotations

from typing import Any

import pytest

from tenon.data.convert import make_converter
from tenon.data.formats import detect_format
from tenon.data.messages import BadRowError
from tenon.data.rows import Chat, Completion, Row, Text
from tenon.errors import DataError
from tests.data.build import chat


def _convert(tree: dict[str, Any], *, prompt: str = "{text}", asked: str = "auto", **columns: str) -> Row:
    form = detect_format([tree], source="f", asked=asked, columns=columns, prompt=prompt)
    return make_converter(form)(tree, "f:1")


def _chat(*turns: tuple[str, str], **rest: Any) -> Chat:
    messages = tuple({"role": role, "content": content} for role, content in turns)
    return Chat(messages, rest.pop("tools", None), "f:1", **rest)


def test_messages_with_tools_and_a_system_field() -> None:
    tree = chat("2+2?", "4") | {"tools": '[{"name": "add"}]', "system": "count"}
    tools = ({"type": "function", "function": {"name": "add"}},)
    assert _convert(tree) == _chat(("system", "count"), ("user", "2+2?"), ("assistant", "4"), tools=tools)


def test_a_system_field_moves_what_is_muted() -> None:
    tree = chat("a", "b")
    tree["messages"] = [*tree["messages"], *chat("c", "d")["messages"]]
    tree["messages"][1]["weight"] = 0
    row = _convert(tree | {"system": "s"})
    assert isinstance(row, Chat)
    assert row.muted == (2,)
    assert row.messages[2] == {"role": "assistant", "content": "b"}


def test_alpaca_in_full() -> None:
    tree = {"instruction": "add", "input": "2 2", "output": "4", "system": "s", "history": [["1 1", "2"]]}
    expected = _chat(("system", "s"), ("user", "1 1"), ("assistant", "2"), ("user", "add\n2 2"), ("assistant", "4"))
    assert _convert(tree) == expected
    assert _convert({"instruction": "a", "output": "b"}) == _chat(("user", "a"), ("assistant", "b"))


def test_prompt_and_completion_as_strings_and_as_messages() -> None:
    assert _convert({"prompt": "2+2=", "completion": "4"}) == Completion("2+2=", "4", "f:1")
    before = chat("a", "b")["messages"] + [{"role": "user", "content": "c"}]
    row = _convert({"prompt": before, "completion": [{"role": "assistant", "content": "d"}]})
    assert row == _chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), muted=(1,))


def test_text() -> None:
    assert _convert({"text": "once"}) == Text("once", "f:1")


def test_labelled_rows_ask_with_the_prompt_and_remember_the_label() -> None:
    row = _convert({"text": "hi", "label": "greeting"})
    assert row == _chat(("user", "hi"), ("assistant", "greeting"), label="greeting")
    tree = {"title": "Re:", "body": "hi {x}", "class": 3}
    row = _convert(tree, prompt="{title} {text}{{?}}", text="body", label="class")
    assert row == _chat(("user", "Re: hi {x}{?}"), ("assistant", "3"), label="3")
    assert _convert({"text": "x", "label": True}) == _chat(("user", "x"), ("assistant", "true"), label="true")


@pytest.mark.parametrize(
    "prompt", ["{text.__class__}", "{text!r}", "{text:>9}", "{}", "{0}", "{text", "no place", "{label}"]
)
def test_prompts_that_cannot_be_filled_are_refused(prompt: str) -> None:
    with pytest.raises(DataError) as caught:
        _convert({"text": "hi", "label": "a"}, prompt=prompt)
    assert caught.value.code == "data-prompt"


@pytest.mark.parametrize(
    ("form", "tree", "code"),
    [
        ({"text": "a", "label": "b"}, {"text": "a", "label": ""}, "data-row-empty"),
        ({"text": "a", "label": "b"}, {"text": " ", "label": "b"}, "data-row-empty"),
        ({"text": "a", "label": "b"}, {"text": "a", "label": None}, "data-row-shape"),
        ({"text": "a", "label": "b"}, {"text": "a", "label": 0.5}, "data-row-shape"),
        ({"text": "a", "label": "b"}, {"text": ["a"], "label": "b"}, "data-row-shape"),
        ({"instruction": "a", "output": "b"}, {"instruction": "a", "output": ""}, "data-row-empty"),
        ({"instruction": "a", "output": "b"}, {"instruction": "", "output": "b"}, "data-row-empty"),
        ({"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b", "history": ["x"]}, "data-row-shape"),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}, "data-row-empty"),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": []}, "data-row-shape"),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a"}, "data-row-shape"),
        ({"text": "a"}, {"text": ""}, "data-row-empty"),
        ({"text": "a"}, {"text": 4}, "data-row-shape"),
    ],
)
def test_rows_that_cannot_be_learnt_from(form: dict[str, Any], tree: dict[str, Any], code: str) -> None:
    convert = make_converter(detect_format([form], source="f", columns={}, prompt="{text}"))
    with pytest.raises(BadRowError) as caught:
        convert(tree, "f:1")
    assert caught.value.code == code


def test_a_row_without_a_column_of_the_prompt_is_bad() -> None:
    form = detect_format([{"text": "a", "label": "b"}], source="f", columns={}, prompt="{title}: {text}")
    with pytest.raises(BadRowError) as caught:
        make_converter(form)({"text": "a", "label": "b"}, "f:1")
    assert caught.value.code == "data-prompt-column"
