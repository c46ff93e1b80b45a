"""The three kinds of rows that every format becomes: a chat, a prompt with its completion, plain text.

Labelled rows are chats that remember their label. Rows are plain frozen values: they pickle, they compare, and they
have one canonical JSON form, whose hash says whether two rows hold the same. This module does not know files, formats
or tokens.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import orjson

# Among ten million rows, two different ones share 8 bytes with a chance of one in 300,000.
HASH_BYTES = 8

# One message as chat templates read it: role and content, and where they occur reasoning_content, tool_calls,
# tool_call_id, name. Roles: system, developer, user, assistant, tool.
Message = dict[str, Any]
ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation.

    source: "file:line", or "file#row" where lines mean nothing. tools: JSON schemas of callable functions, or None.
    label: the class of a labelled row (then messages are a prompt and the label as the answer), else None.
    muted: indices of assistant messages that are never supervised (a prompt's own turns; `weight: 0`).
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None
    source: str
    label: str | None = None
    muted: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and what follows it, as plain strings without a chat template; only the completion is supervised."""

    prompt: str
    completion: str
    source: str


@dataclass(frozen=True, slots=True)
class Text:
    """Running text; every token is supervised."""

    text: str
    source: str


Row = Chat | Completion | Text


def row_tree(row: Row) -> dict[str, Any]:
    """The JSON tree of what the row holds, without where it came from; inverse of `row_from_tree`."""
    if isinstance(row, Text):
        return {"text": row.text}
    if isinstance(row, Completion):
        return {"prompt": row.prompt, "completion": row.completion}
    tree: dict[str, Any] = {"messages": list(row.messages)}
    if row.tools is not None:
        tree["tools"] = list(row.tools)
    if row.label is not None:
        tree["label"] = row.label
    if row.muted:
        tree["muted"] = list(row.muted)
    return tree


def row_from_tree(tree: dict[str, Any], source: str) -> Row:
    """The row that `row_tree` described."""
    if "messages" in tree:
        tools = tree.get("tools")
        return Chat(
            messages=tuple(tree["messages"]),
            tools=None if tools is None else tuple(tools),
            source=source,
            label=tree.get("label"),
            muted=tuple(tree.get("muted", ())),
        )
    if "text" in tree:
        return Text(tree["text"], source)
    return Completion(tree["prompt"], tree["completion"], source)


def row_bytes(row: Row) -> bytes:
    """The canonical JSON of what the row holds: the keys of the tree sorted, no spaces, UTF-8."""
    return orjson.dumps(row_tree(row), option=orjson.OPT_SORT_KEYS)


def row_hash(row: Row) -> bytes:
    """BLAKE2b of the canonical JSON, 8 bytes: equal for rows that hold the same, wherever they came from."""
    return hashlib.blake2b(row_bytes(row), digest_size=HASH_BYTES).digest()
