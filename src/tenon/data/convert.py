"""Turns one raw record into a Row, and checks that it can be learnt from.

One converter per format; each raises BadRowError with the reason and leaves the place to its caller. This module does
not know files.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

from tenon.data.formats import Format
from tenon.data.messages import (
    BadRowError,
    canonical_messages,
    canonical_tools,
    check_conversation,
    shape_error,
)
from tenon.data.rows import Chat, Completion, Message, Row, Text
from tenon.errors import DataError

Tree = dict[str, Any]
# (record, source) -> row; raises BadRowError.
Converter = Callable[[Tree, str], Row]


def make_converter(form: Format) -> Converter:
    """The converter of a format. Raises DataError data-prompt when a labelled prompt cannot be filled."""
    makers: dict[str, Callable[[Format], Converter]] = {
        "messages": _messages_converter,
        "sharegpt": _messages_converter,
        "alpaca": _alpaca_converter,
        "prompt_completion": _prompt_converter,
        "labelled": _labelled_converter,
        "text": _text_converter,
    }
    return makers[form.name](form)


def _messages_converter(form: Format) -> Converter:
    sharegpt = form.name == "sharegpt"
    column = form.columns["conversations" if sharegpt else "messages"]
    tools_column = form.columns.get("tools")
    system_column = form.columns.get("system")

    def convert(tree: Tree, source: str) -> Row:
        messages, muted = canonical_messages(tree.get(column), sharegpt=sharegpt)
        system = tree.get(system_column) if system_column else None
        if system and messages[0]["role"] != "system":
            messages = ({"role": "system", "content": _string(system, "system")}, *messages)
            muted = tuple(index + 1 for index in muted)
        check_conversation(messages, muted)
        tools = canonical_tools(tree.get(tools_column)) if tools_column else None
        return Chat(messages, tools, source, None, muted)

    return convert


def _alpaca_converter(form: Format) -> Converter:
    columns = form.columns

    def field(tree: Tree, name: str) -> str:
        value = tree.get(columns.get(name, name))
        return "" if value is None else _string(value, name)

    def convert(tree: Tree, source: str) -> Row:
        messages: list[Message] = []
        if system := field(tree, "system"):
            messages.append({"role": "system", "content": system})
        for turn in tree.get(columns.get("history", "history")) or ():
            if not isinstance(turn, list | tuple) or len(turn) != 2:
                raise shape_error("a turn of the history is not a pair of question and answer", turn)
            messages.append({"role": "user", "content": _string(turn[0], "history")})
            messages.append({"role": "assistant", "content": _string(turn[1], "history")})
        asked = "\n".join(part for part in (field(tree, "instruction"), field(tree, "input")) if part)
        answer = field(tree, "output")
        _require(asked, "the instruction is empty")
        _require(answer, "the output is empty")
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answer})
        return Chat(tuple(messages), None, source)

    return convert


def _prompt_converter(form: Format) -> Converter:
    prompt_column, completion_column = form.columns["prompt"], form.columns["completion"]
    tools_column = form.columns.get("tools")

    def convert(tree: Tree, source: str) -> Row:
        prompt, completion = tree.get(prompt_column), tree.get(completion_column)
        if isinstance(prompt, str) and isinstance(completion, str):
            _require(completion, "the completion is empty")
            return Completion(prompt, completion, source)
        if isinstance(prompt, list) and isinstance(completion, list):
            before, _ = canonical_messages(prompt, sharegpt=False)
            after, quiet = canonical_messages(completion, sharegpt=False)
            messages = before + after
            turns = [index for index, message in enumerate(before) if message["role"] == "assistant"]
            muted = (*turns, *(index + len(before) for index in quiet))
            check_conversation(messages, muted)
            return Chat(
                messages, canonical_tools(tree.get(tools_column)) if tools_column else None, source, None, muted
            )
        raise shape_error(
            "prompt and completion are neither two strings nor two lists of messages",
            f"{type(prompt).__name__} and {type(completion).__name__}",
        )

    return convert


def _text_converter(form: Format) -> Converter:
    column = form.columns["text"]

    def convert(tree: Tree, source: str) -> Row:
        text = _string(tree.get(column), column)
        _require(text, "the text is empty")
        return Text(text, source)

    return convert


def _labelled_converter(form: Format) -> Converter:
    text_column, label_column = form.columns["text"], form.columns["label"]
    pieces = _parse_prompt(form)
    plain = pieces == [("", text_column)]

    def convert(tree: Tree, source: str) -> Row:
        text = tree.get(text_column)
        label = tree.get(label_column)
        if type(text) is not str or not text.strip():
            text = _string(text, text_column)
            _require(text, "the text is empty")
        if type(label) is not str or not label.strip():
            label = _label(label, label_column)
        asked = text if plain else "".join(before + _place(tree, column) for before, column in pieces)
        messages = ({"role": "user", "content": asked}, {"role": "assistant", "content": label})
        return Chat(messages, None, source, label)

    return convert


def _parse_prompt(form: Format) -> list[tuple[str, str]]:
    """[(literal text, the file's column that follows it, or "")]. Attributes, indices and conversions are refused."""
    try:
        parsed = list(string.Formatter().parse(form.prompt))
    except ValueError as error:
        raise _prompt_error(form, f"the prompt cannot be read: {error}") from error
    pieces: list[tuple[str, str]] = []
    for literal, name, spec, conversion in parsed:
        if name is not None and (not name.isidentifier() or spec or conversion):
            raise _prompt_error(form, f"the prompt has a place that is no column name: {name!r}")
        column = "" if name is None else form.columns.get(name, name)
        if name is not None and column == form.columns["label"]:
            raise _prompt_error(form, "the prompt gives the label away")
        pieces.append((literal, column))
    if not any(column for _, column in pieces):
        raise _prompt_error(form, "the prompt has no place for a column")
    return pieces


def _prompt_error(form: Format, what: str) -> DataError:
    return DataError(
        "data-prompt",
        what,
        got=form.prompt,
        hint="write columns in braces, as in data.prompt: 'Which intent? {text}'; a brace itself is {{ or }}",
    )


def _place(tree: Tree, column: str) -> str:
    if not column:
        return ""
    value = tree.get(column)
    if value is None:
        raise BadRowError(
            "data-prompt-column",
            f"the prompt names the column {column}, which the row does not have",
            hint="correct data.prompt or the row, or set data.on_bad: drop",
        )
    return value if isinstance(value, str) else _label(value, column)


def _label(value: Any, column: str) -> str:
    """Numbers and truth values become their JSON text; a label is otherwise a string."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    text = _string(value, column)
    _require(text, f"the {column} is empty")
    return text


def _string(value: Any, column: str) -> str:
    if isinstance(value, str):
        return value
    raise shape_error(f"the {column} is not a string", value)


def _require(text: str, reason: str) -> None:
    if not text.strip():
        raise BadRowError("data-row-empty", reason, hint="fill it, or set data.on_bad: drop")
