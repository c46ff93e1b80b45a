"""Brings messages of every dialect to one canonical form, and checks that they make a conversation.

Canonical: content is a string, tool calls carry their arguments as an object, reasoning is `reasoning_content`.
This module does not know files, formats of rows, or templates.
"""

from __future__ import annotations

from typing import Any

import orjson

from tenon.data.rows import ROLES, Message

ROLE_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
CALL_ROLES = frozenset({"function_call", "tool_call"})
TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
REASONING_PARTS = frozenset({"reasoning", "thinking"})
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
WEIGHT_KEYS = ("weight", "loss_weight", "train")
_PLAIN = frozenset({"system", "user", "assistant"})


class BadRowError(Exception):
    """A row that cannot be trained on; its place is added by whoever knows it.

    code: a DataError code. reason: one lower-case fact. got: the offending value. hint: what to change.
    """

    def __init__(self, code: str, reason: str, *, got: str = "", hint: str) -> None:
        self.code = code
        self.reason = reason
        self.got = got
        self.hint = hint
        super().__init__(reason)


def shape_error(reason: str, got: object = "") -> BadRowError:
    """The error for a value of the wrong type or form."""
    text = got if isinstance(got, str) else repr(got)
    return BadRowError("data-row-shape", reason, got=text[:80], hint="correct the row, or set data.on_bad: drop")


def canonical_messages(raw: Any, *, sharegpt: bool) -> tuple[tuple[Message, ...], tuple[int, ...]]:
    """(messages, indices of muted assistant messages) of one conversation.

    sharegpt: messages say from/value instead of role/content. Raises BadRowError.
    """
    if not isinstance(raw, list) or not raw:
        raise shape_error("the conversation is not a list of messages", raw)
    messages: list[Message] = []
    muted: list[int] = []
    for position, message in enumerate(raw):
        # The ordinary message needs no rewriting; this test is most of what an index pass does.
        if (
            type(message) is dict
            and len(message) == 2
            and type(message.get("content")) is str
            and message.get("role") in _PLAIN
        ):
            messages.append(message)
            continue
        if not isinstance(message, dict):
            raise shape_error(f"message {position + 1} is not an object", message)
        if _is_muted(message, position):
            muted.append(position)
        messages.append(_rewrite(_as_role_content(message) if sharegpt else message, position))
    return tuple(messages), tuple(index for index in muted if messages[index]["role"] == "assistant")


def _as_role_content(message: dict[str, Any]) -> dict[str, Any]:
    if "from" not in message:
        return message
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {"role": message["from"], "content": message.get("value"), **rest}


def _is_muted(message: dict[str, Any], position: int) -> bool:
    for key in WEIGHT_KEYS:
        weight = message.get(key)
        if weight is None or weight == 1:
            continue
        if weight == 0:
            return True
        raise shape_error(f"message {position + 1} has a {key} that is neither 0 nor 1", weight)
    return False


def _rewrite(message: dict[str, Any], position: int) -> Message:
    role = message.get("role")
    content, reasoning, calls = _split_content(message.get("content"), position)
    if role in CALL_ROLES:
        role, content, calls = "assistant", "", [*calls, *_parse_calls(content, position)]
    role = ROLE_NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise BadRowError(
            "data-role-unknown",
            f"message {position + 1} has an unknown role",
            got=repr(role)[:40],
            hint=f"use one of {', '.join(sorted(ROLES))}",
        )
    rewritten: Message = {"role": role, "content": content}
    for key in REASONING_KEYS:
        if isinstance(message.get(key), str):
            reasoning = message[key]
    if reasoning:
        rewritten["reasoning_content"] = reasoning
    if isinstance(message.get("function_call"), dict):
        calls.append(message["function_call"])
    if message.get("tool_calls"):
        calls.extend(_call_list(message["tool_calls"], position))
    if calls:
        rewritten["tool_calls"] = [_canonical_call(call, position) for call in calls]
    for key in ("name", "tool_call_id"):
        if isinstance(message.get(key), str):
            rewritten[key] = message[key]
    return rewritten


def _split_content(content: Any, position: int) -> tuple[str, str, list[Any]]:
    """(text, reasoning, tool calls) of a message's content: a string, nothing, or a list of typed parts."""
    if content is None:
        return "", "", []
    if isinstance(content, str):
        return content, "", []
    if not isinstance(content, list):
        raise shape_error(f"message {position + 1} has content that is neither a string nor a list of parts", content)
    text: list[str] = []
    reasoning: list[str] = []
    calls: list[Any] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        value = next((part[key] for key in ("text", "value", "thinking") if key in part), None) if kind else None
        if not isinstance(value, str):
            raise _not_text(position, kind)
        if kind in TEXT_PARTS:
            text.append(value)
        elif kind in REASONING_PARTS:
            reasoning.append(value)
        elif kind == "tool_call":
            calls.extend(_parse_calls(value, position))
        else:
            raise _not_text(position, kind)
    return "".join(text), "".join(reasoning), calls


def _not_text(position: int, kind: object) -> BadRowError:
    return BadRowError(
        "data-row-media",
        f"message {position + 1} has a content part that is not text",
        got=repr(kind)[:40],
        hint="only text is trained: remove the part, or set data.on_bad: drop",
    )


def _parse_calls(text: str, position: int) -> list[Any]:
    try:
        tree = orjson.loads(text)
    except orjson.JSONDecodeError:
        raise _bad_call(position, "is not JSON", text) from None
    return tree if isinstance(tree, list) else [tree]


def _call_list(calls: Any, position: int) -> list[Any]:
    if isinstance(calls, str):
        return _parse_calls(calls, position)
    return calls if isinstance(calls, list) else [calls]


def _canonical_call(call: Any, position: int) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _bad_call(position, "names no function", repr(call))
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = orjson.loads(arguments or "{}")
        except orjson.JSONDecodeError:
            raise _bad_call(position, "has arguments that are not JSON", arguments) from None
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise _bad_call(position, "has arguments that are not an object", repr(arguments))
    canonical: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if isinstance(call.get("id"), str):
        canonical["id"] = call["id"]
    return canonical


def _bad_call(position: int, what: str, got: str) -> BadRowError:
    return BadRowError(
        "data-tool-call",
        f"the tool call of message {position + 1} {what}",
        got=got[:80],
        hint='write {"name": ..., "arguments": {...}}, or set data.on_bad: drop',
    )


def canonical_tools(raw: Any) -> tuple[dict[str, Any], ...] | None:
    """The row's tools as `{"type": "function", "function": {...}}`; None when it has none. Raises BadRowError."""
    if isinstance(raw, str):
        try:
            raw = orjson.loads(raw) if raw.strip() else None
        except orjson.JSONDecodeError:
            raise shape_error("the tools are not JSON", raw) from None
    if not raw:
        return None
    if not isinstance(raw, list) or not all(isinstance(tool, dict) for tool in raw):
        raise shape_error("the tools are not a list of objects", raw)
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in raw)


def check_conversation(messages: tuple[Message, ...], muted: tuple[int, ...] = ()) -> None:
    """Raise BadRowError unless somebody is answered: an assistant turn with something in it, in a sane order."""
    previous = ""
    answers = 0
    for position, message in enumerate(messages):
        role = message["role"]
        if role == "tool" and previous not in ("assistant", "tool"):
            raise _order_error(
                f"message {position + 1} is a tool's answer, but no assistant turn comes before it", messages
            )
        if role == "assistant":
            filled = message["content"] or len(message) > 2
            answers += 1 if filled and position not in muted else 0
        previous = role
    if previous != "assistant" and any(message["role"] == "assistant" for message in messages):
        raise _order_error(f"the last message is from {previous}: no assistant turn answers it", messages)
    if answers:
        return
    if any(message["role"] == "assistant" for message in messages):
        raise BadRowError(
            "data-row-empty",
            "every assistant turn is empty or has weight 0",
            got=roles_of(messages),
            hint="fill the answer, or set data.on_bad: drop",
        )
    raise BadRowError(
        "data-no-assistant",
        "the row has no assistant turn",
        got=f"roles {roles_of(messages)}",
        hint="add an assistant message, or set data.on_bad: drop",
    )


def _order_error(reason: str, messages: tuple[Message, ...]) -> BadRowError:
    hint = "correct the order, or set data.on_bad: drop"
    return BadRowError("data-row-order", reason, got=f"roles {roles_of(messages)}", hint=hint)


def roles_of(messages: tuple[Message, ...]) -> str:
    """The roles in order, for messages."""
    roles = [str(message["role"]) for message in messages]
    return ",".join(roles if len(roles) <= 8 else [*roles[:8], "…"])
