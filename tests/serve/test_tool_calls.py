"""Calls in texts of every format, however they are cut into pieces; what is no call stays text, and nothing is lost."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenon.serve.text.tool_calls import CallArguments, CallBegins, CallScanner
from tenon.serve.text.tool_formats import HERMES, LLAMA, MISTRAL, MISTRAL_ARGS, CallFormat, call_format

NAMES = ("get_weather", "add")
ARGUMENTS = '{"city": "Ulm \\"}{\\\\", "deep": [{"a": 1}]}'


def read(form: CallFormat, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    scanner, text, calls = CallScanner(form, NAMES), "", {}
    for part in [*(part for piece in pieces for part in scanner.push(piece)), *scanner.finish()]:
        if isinstance(part, CallBegins):
            calls[part.number] = (part.name, "")
        elif isinstance(part, CallArguments):
            calls[part.number] = (calls[part.number][0], calls[part.number][1] + part.text)
        else:
            text += part
    assert list(calls) == list(range(scanner.calls))
    return text, list(calls.values())


def written(form: CallFormat, *calls: tuple[str, str]) -> str:
    if form.bare:
        return "".join(f"[TOOL_CALLS]{name}[ARGS]{arguments}" for name, arguments in calls)
    objects = [f'{{"name": "{name}", "{form.key}": {arguments}}}' for name, arguments in calls]
    if form.listed:
        return f"[TOOL_CALLS] [{', '.join(objects)}]"
    return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in objects) if form.closes else "; ".join(objects)


TEXTS = [
    (form, before + written(form, *calls), before.strip(), list(calls))
    for form in (HERMES, MISTRAL, MISTRAL_ARGS, LLAMA)
    for calls in ((("get_weather", ARGUMENTS),), (("add", "{}"), ("get_weather", ARGUMENTS)))
    for before in ([""] if not form.opens else ["", "I look: <tool and [TOO\n"])
]


@settings(max_examples=150, deadline=None)
@given(case=st.sampled_from(TEXTS), cuts=st.lists(st.integers(0, 400), max_size=30))
def test_calls_are_found_however_the_text_is_cut(
    case: tuple[CallFormat, str, str, list[tuple[str, str]]], cuts: list[int]
) -> None:
    form, text, said, calls = case
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    found_text, found_calls = read(form, pieces)
    assert found_calls == calls and found_text.strip() == said
    assert all(json.loads(arguments) is not None for _, arguments in found_calls)


PLAIN = [
    (HERMES, "no call at all, only < and <tool"),
    (HERMES, "<tool_call>not json</tool_call> and more"),
    (HERMES, '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "add", "arguments": 3}</tool_call>'),
    (HERMES, '<tool_call>{"name": "add"'),
    (LLAMA, '{"answer": 42, "name": "add"}'),
    (LLAMA, "Hello {there}"),
    (LLAMA, '{"name": "unknown", "parameters": {}}'),
    (LLAMA, '{"na'),
    (MISTRAL, "[TOOL_CALLS] sorry"),
    (MISTRAL, '[TOOL_CALLS] [{"name": "unknown", "arguments": {}}]'),
    (MISTRAL_ARGS, "[TOOL_CALLS]unknown[ARGS]{}"),
]


@pytest.mark.parametrize(("form", "text"), PLAIN)
def test_what_is_no_call_stays_text_and_nothing_is_lost(form: CallFormat, text: str) -> None:
    for pieces in ([text], list(text), [text[:7], text[7:]]):
        assert read(form, pieces) == (text, [])


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>',
        '<tool_call>[{"name": "add", "arguments": {"a": 1}}]</tool_call>',
        '<tool_call>{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>',
        '<tool_call>{"name":"add","arguments":{"a":1}}</tool_call>',
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}',
    ],
)
def test_calls_in_other_words_are_calls(text: str) -> None:
    for pieces in ([text], list(text)):
        said, calls = read(HERMES, pieces)
        assert (said, [(name, json.loads(arguments)) for name, arguments in calls]) == ("", [("add", {"a": 1})])


def test_a_list_of_calls_between_the_tags() -> None:
    text = '<tool_call>[{"name": "add", "arguments": {}}, {"name": "add", "arguments": {"b": 2}}]</tool_call>'
    assert read(HERMES, list(text)) == ("", [("add", "{}"), ("add", '{"b": 2}')])


def test_arguments_that_break_off_are_told_as_far_as_they_came() -> None:
    said, calls = read(HERMES, ['<tool_call>\n{"name": "add", "arguments": {"a": "lon'])
    assert (said, calls) == ("", [("add", '{"a": "lon')])


def test_arguments_come_piecewise() -> None:
    scanner = CallScanner(HERMES, NAMES)
    assert scanner.push('hi <tool_call>{"name": "add", "argu') == ["hi "]
    assert scanner.push('ments": {"a"') == [CallBegins(0, "add"), CallArguments(0, '{"a"')]
    assert scanner.push(": 1") == [CallArguments(0, ": 1")]


def test_formats_are_chosen_by_what_templates_say() -> None:
    assert call_format("{{ '<tool_call>' }}") is HERMES
    assert call_format("[TOOL_CALLS] [AVAILABLE_TOOLS]") is MISTRAL
    assert call_format("[TOOL_CALLS] x [ARGS]") is MISTRAL_ARGS
    assert call_format("Environment: ipython <|python_tag|>") is LLAMA
    assert call_format("<tool_call><function=") is None and call_format("{{ tools }}") is None
