"""Messages of every dialect in one form; conversations that nobody can learn from are refused."""

from __future__ import annotations

from typing import Any

import pytest

from tenon.data.messages import BadRowError, canonical_messages, canonical_tools, check_conversation


def _one(message: dict[str, Any], *, sharegpt: bool = False) -> dict[str, Any]:
    messages, _ = canonical_messages([message], sharegpt=sharegpt)
    return messages[0]


def _refusal(raw: Any, *, sharegpt: bool = False) -> BadRowError:
    with pytest.raises(BadRowError) as caught:
        check_conversation(*canonical_messages(raw, sharegpt=sharegpt))
    return caught.value


def _said(*roles: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": "x"} for role in roles]


CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "user", "content": "hi", "id": 7}, {"role": "user", "content": "hi"}),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "user", "content": "ab"},
        ),
        (
            {"role": "assistant", "content": "x", "thinking": "hm"},
            {"role": "assistant", "content": "x", "reasoning_content": "hm"},
        ),
        (
            {"role": "assistant", "content": [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "x"}]},
            {"role": "assistant", "content": "x", "reasoning_content": "hm"},
        ),
        (
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
                ],
            },
            {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "c1"}]},
        ),
        (
            {"role": "assistant", "content": [{"type": "tool_call", "value": '{"name": "f", "arguments": {"a": 1}}'}]},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
        ),
        (
            {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": '{"a": 1}'}},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
        ),
        (
            {"role": "tool", "content": "4", "tool_call_id": "c1", "name": "f"},
            {"role": "tool", "content": "4", "name": "f", "tool_call_id": "c1"},
        ),
        ({"role": "function", "content": "4", "name": "f"}, {"role": "tool", "content": "4", "name": "f"}),
        ({"role": "developer", "content": "be brief"}, {"role": "developer", "content": "be brief"}),
    ],
)
def test_openai_messages(message: dict[str, Any], expected: dict[str, Any]) -> None:
    assert _one(message) == expected


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"from": "human", "value": "hi"}, {"role": "user", "content": "hi"}),
        ({"from": "gpt", "value": "hi"}, {"role": "assistant", "content": "hi"}),
        ({"from": "system", "value": "hi"}, {"role": "system", "content": "hi"}),
        ({"from": "observation", "value": "4"}, {"role": "tool", "content": "4"}),
        (
            {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
        ),
        (
            {"from": "function_call", "value": '[{"name": "f", "arguments": {"a": 1}}, {"name": "g"}]'},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [CALL, {"type": "function", "function": {"name": "g", "arguments": {}}}],
            },
        ),
    ],
)
def test_sharegpt_messages(message: dict[str, Any], expected: dict[str, Any]) -> None:
    assert _one(message, sharegpt=True) == expected


def test_weights_mute_assistant_turns_alone() -> None:
    raw = _said("user", "assistant", "user", "assistant")
    raw[0]["loss_weight"] = 0.0
    raw[1]["weight"] = 0
    raw[3]["weight"] = 1
    messages, muted = canonical_messages(raw, sharegpt=False)
    assert muted == (1,)
    assert list(messages) == _said("user", "assistant", "user", "assistant")
    raw[3]["weight"] = 0.5
    assert _refusal(raw).code == "data-row-shape"


def test_tools_as_text_and_bare_are_wrapped() -> None:
    wrapped = ({"type": "function", "function": {"name": "f"}},)
    assert canonical_tools('[{"name": "f"}]') == wrapped
    assert canonical_tools(list(wrapped)) == wrapped
    assert canonical_tools("") is None
    assert canonical_tools([]) is None
    for broken in ("[{", "7", ["f"]):
        with pytest.raises(BadRowError) as caught:
            canonical_tools(broken)
        assert caught.value.code == "data-row-shape"


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        ([], "data-row-shape"),
        ("hi", "data-row-shape"),
        (["hi"], "data-row-shape"),
        ([{"role": "user", "content": 7}], "data-row-shape"),
        ([{"role": "wizard", "content": "x"}], "data-role-unknown"),
        ([{"content": "x"}], "data-role-unknown"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "data-row-media"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"id": "x"}]}], "data-tool-call"),
        ([{"role": "assistant", "content": "", "tool_calls": "{"}], "data-tool-call"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}], "data-tool-call"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}], "data-tool-call"),
        (_said("user"), "data-no-assistant"),
        (_said("system", "user", "user"), "data-no-assistant"),
        (_said("user", "assistant", "user"), "data-row-order"),
        (_said("user", "tool", "assistant"), "data-row-order"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}], "data-row-empty"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "x", "weight": 0}], "data-row-empty"),
    ],
)
def test_conversations_that_cannot_be_learnt_from(raw: Any, code: str) -> None:
    assert _refusal(raw).code == code


@pytest.mark.parametrize(
    "roles",
    [
        ("user", "assistant"),
        ("system", "user", "assistant"),
        ("assistant", "user", "assistant"),
        ("user", "user", "assistant"),
        ("user", "assistant", "tool", "tool", "assistant"),
        ("user", "assistant", "assistant"),
    ],
)
def test_conversations_in_a_sane_order(roles: tuple[str, ...]) -> None:
    check_conversation(*canonical_messages(_said(*roles), sharegpt=False))
