"""Invisible markers around what the messages of a row say, so that it can be found again in the rendered text.

A marker is one private-use character that occurs nowhere else in the row. String number i gets the characters 2i
(before) and 2i + 1 (after) of an alphabet, around the text without its outer spaces, so that templates that strip it
leave them in place. Whoever uses them must check that the rendering without markers equals the plain rendering; a
template that looks at the first letter of a message may behave differently, and then markers prove nothing.
This module knows no templates and no tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tenon.data.rows import Message

MOST_STRINGS = 32_000
GENERATION_OPENS = 0xFFF0
GENERATION_CLOSES = 0xFFF1
SPOKEN_KEYS = frozenset({"content", "reasoning_content", "thinking", "reasoning"})


@dataclass(frozen=True, slots=True)
class Hit:
    """One marker: the character of the unmarked text before which it stood, and its number in the alphabet."""

    at: int
    code: int

    @property
    def string(self) -> int:
        """Number of the string that it surrounds."""
        return self.code // 2

    @property
    def closes(self) -> bool:
        """Whether it stood after the string and not before it."""
        return self.code % 2 == 1


@dataclass(frozen=True)
class Alphabet:
    """The 65,534 private-use characters from `base` on."""

    base: int

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches any one marker."""
        return re.compile(f"[{chr(self.base)}-{chr(self.base + 0xFFFD)}]")

    @property
    def generation_marks(self) -> tuple[str, str]:
        """The pair for `{% generation %}` blocks."""
        return chr(self.base + GENERATION_OPENS), chr(self.base + GENERATION_CLOSES)

    def occurs_in(self, text: str) -> bool:
        """Whether a text holds one of these characters already."""
        return self.pattern.search(text) is not None

    def around(self, text: str, number: int) -> str:
        """The text with its markers, inside its outer spaces."""
        core = text.strip()
        head = text[: len(text) - len(text.lstrip())] if core else ""
        tail = text[len(head) + len(core) :]
        return f"{head}{chr(self.base + 2 * number)}{core}{chr(self.base + 2 * number + 1)}{tail}"

    def take_out(self, text: str) -> tuple[str, list[Hit]]:
        """The text without markers, and the markers in order."""
        hits = [
            Hit(match.start() - before, ord(match.group()) - self.base)
            for before, match in enumerate(self.pattern.finditer(text))
        ]
        return self.pattern.sub("", text), hits


ALPHABETS = (Alphabet(0xF0000), Alphabet(0x100000))


class Marking:
    """Messages with markers around every string of their content, reasoning and tool calls.

    messages: the marked copies. owners: number of a string -> number of its message. loud: numbers of the strings
    that a template has no reason to leave out (reasoning is left out of a history by many). complete: whether the
    alphabet was large enough. Blank strings stay as they are, except that an assistant who says nothing at all gets a
    pair of markers in its empty content.
    """

    def __init__(self, messages: Sequence[Message], alphabet: Alphabet) -> None:
        self.alphabet = alphabet
        self.owners: list[int] = []
        self.loud: set[int] = set()
        self.messages = tuple(self._marked(number, message) for number, message in enumerate(messages))
        self.complete = len(self.owners) <= MOST_STRINGS

    def owner(self, hit: Hit) -> int:
        """Number of the message that a marker belongs to."""
        return self.owners[hit.string]

    def _marked(self, number: int, message: Message) -> Message:
        found: Message = {}
        before = len(self.owners)
        for key, value in message.items():
            if key in SPOKEN_KEYS:
                found[key] = self._spoken(value, number, loud=key == "content")
            elif key == "tool_calls" and isinstance(value, list):
                found[key] = [self._call(call, number) for call in value]
            else:
                found[key] = value
        content = message.get("content")
        if message.get("role") == "assistant" and isinstance(content, str) and len(self.owners) == before:
            found["content"] = self._around(content, number, loud=False)
        return found

    def _around(self, text: str, number: int, *, loud: bool) -> str:
        if loud:
            self.loud.add(len(self.owners))
        self.owners.append(number)
        return self.alphabet.around(text, min(len(self.owners), MOST_STRINGS) - 1)

    def _spoken(self, value: Any, number: int, *, loud: bool) -> Any:
        if isinstance(value, str):
            return self._around(value, number, loud=loud) if value.strip() else value
        if isinstance(value, list):
            return [self._spoken(part, number, loud=loud) for part in value]
        if isinstance(value, dict) and isinstance(value.get("text"), str):
            return {**value, "text": self._spoken(value["text"], number, loud=loud)}
        return value

    def _call(self, call: Any, number: int) -> Any:
        if not isinstance(call, dict):
            return call
        found = dict(call)
        if isinstance(call.get("function"), dict):
            found["function"] = self._call(call["function"], number)
            return found
        for key in ("name", "arguments"):
            if key in call:
                found[key] = self._leaves(call[key], number)
        return found

    def _leaves(self, value: Any, number: int) -> Any:
        if isinstance(value, str):
            return self._around(value, number, loud=True) if value.strip() else value
        if isinstance(value, list):
            return [self._leaves(item, number) for item in value]
        if isinstance(value, dict):
            return {key: self._leaves(item, number) for key, item in value.items()}
        return value


def unmarked_texts(message: Message) -> Iterator[str]:
    """Every string of a message that gets no markers: names, ids, keys."""
    for key, value in message.items():
        if key == "role" or (key in SPOKEN_KEYS and isinstance(value, str)):
            continue
        if key in SPOKEN_KEYS:
            yield from _strings([_without(part, "text") for part in value if not isinstance(part, str)])
        elif key == "tool_calls":
            yield from _strings([_call_frame(call) for call in value])
        else:
            yield from _strings(value)


def _call_frame(call: Any) -> Any:
    """A tool call without the strings that are marked; keys of its arguments stay."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return [_without(call, "function"), _call_frame(call["function"])]
    return [_without(_without(call, "name"), "arguments"), list(_keys(call.get("arguments")))]


def _without(part: Any, key: str) -> Any:
    return {name: value for name, value in part.items() if name != key} if isinstance(part, dict) else part


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from _keys(item)
    elif isinstance(value, list):
        for item in value:
            yield from _keys(item)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _strings(item)
