"""Calls of functions in an answer's text, as it comes in pieces. What is no call of a known function stays text.

A call's name is told once it and the beginning of its arguments are certain; its arguments are told as they come, as
they are written. This module knows no HTTP and no tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from tenon.serve.text.tool_formats import CallFormat


@dataclass(frozen=True, slots=True)
class CallBegins:
    """A call of this function; `number` counts the calls of one answer from 0."""

    number: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the JSON text of a call's arguments."""

    number: int
    text: str


Part: TypeAlias = str | CallBegins | CallArguments
_NAME = r'"name"\s*:\s*"(?P<name>[^"\\]{1,200})"'
_FIRST_KEYS = ('"name"', '"arguments"', '"parameters"', '"type"', '"function"', '"id"')


class CallScanner:
    """Finds the calls in one answer."""

    def __init__(self, form: CallFormat, functions: Collection[str]) -> None:
        """functions: names that may be called."""
        self._form, self._functions = form, functions
        head = rf'\{{\s*{_NAME}\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{{)'
        if form.bare:
            head = rf"(?P<name>[\w-]{{1,200}})\s*{re.escape(form.bare)}\s*(?=\{{)"
        self._head = re.compile(rf"\s*(?:\[\s*)?{head}")
        self._mode: Literal["text", "head", "arguments", "tail"] = "text" if form.opens else "head"
        self._held, self._opened = "", ""
        self._depth, self._in_string, self._escaped = 0, False, False
        self.calls = 0

    def push(self, piece: str) -> list[Part]:
        """What is certain now."""
        self._held += piece
        found: list[Part] = []
        steps = {"text": self._text, "head": self._begin, "arguments": self._arguments, "tail": self._tail}
        while self._held and steps[self._mode](found):
            pass
        return found

    def finish(self) -> list[Part]:
        """What was held back: nothing more comes."""
        found: list[Part] = []
        if self._mode == "head":
            self._whole(self._held, found)
        elif (self._mode == "text" and self._held) or (self._mode == "tail" and self._held.strip(" \n\t}]")):
            found.append(self._held)
        self._held = ""
        return found

    # ---- each takes what it can from what is held; False: more has to come ---------------------------------------

    def _text(self, found: list[Part]) -> bool:
        """Text up to what opens a call."""
        opens = self._form.opens
        at = self._held.find(opens) if opens else -1
        if at >= 0:
            before = self._held[:at]
            if before.strip():
                found.append(before)
            self._held, self._opened, self._mode = self._held[at + len(opens) :], opens, "head"
            return True
        # Space before a call is no part of what is said.
        sure = len(self._held.rstrip()) if opens else len(self._held)
        begun = next(
            (n for n in range(min(len(self._held), len(opens) - 1), 0, -1) if self._held.endswith(opens[:n])), 0
        )
        if begun:
            sure = len(self._held[: len(self._held) - begun].rstrip())
        if sure:
            found.append(self._held[:sure])
            self._held = self._held[sure:]
        return False

    def _begin(self, found: list[Part]) -> bool:
        """The name of a call, once its arguments begin."""
        match = self._head.match(self._held)
        if match is not None and match["name"] in self._functions:
            found.append(CallBegins(self.calls, match["name"]))
            self.calls += 1
            self._held, self._mode = self._held[match.end() :], "arguments"
            self._depth, self._in_string, self._escaped = 0, False, False
            return True
        if self._form.closes:
            at = self._held.find(self._form.closes)
            if at >= 0:
                body, self._held = self._held[:at], self._held[at + len(self._form.closes) :]
                self._whole(body, found, closed=self._form.closes)
                self._mode = "text"
                return True
        elif match is not None or not self._may_begin():
            self._give_up(found)
            return True
        return False

    def _arguments(self, found: list[Part]) -> bool:
        """The arguments up to their last brace."""
        for at, letter in enumerate(self._held):
            if self._in_string:
                self._in_string = self._escaped or letter != '"'
                self._escaped = letter == "\\" and not self._escaped
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    found.append(CallArguments(self.calls - 1, self._held[: at + 1]))
                    self._held, self._mode = self._held[at + 1 :], "tail"
                    return True
        found.append(CallArguments(self.calls - 1, self._held))
        self._held = ""
        return False

    def _tail(self, found: list[Part]) -> bool:
        """What ends a call: its brace, and a list's; then another call, or text."""
        form = self._form
        if form.closes:
            at = self._held.find(form.closes)
            next_one = re.match(r"\s*\}\s*,\s*(?=\{)", self._held)
            if next_one is not None:
                self._held, self._mode = self._held[next_one.end() :], "head"
                return True
            if at < 0:
                return False
            if self._held[:at].strip(" \n\t}]"):
                found.append(self._held[:at])
            self._held, self._mode = self._held[at + len(form.closes) :], "text"
            return True
        braces = r"\s*" if form.bare else r"\s*\}\s*"
        match = re.match(braces + (r"(?P<more>[,;]\s*(?=\{))?" if not form.bare else ""), self._held)
        if match is None:
            if self._held.strip() in ("", "}"):
                return False
            self._give_up(found)
            return True
        rest = self._held[match.end() :]
        if match.groupdict().get("more"):
            self._held, self._mode = rest, "head"
            return True
        if not rest or rest in (",", ";"):
            return False
        self._held = rest.lstrip("]") if form.listed else rest
        self._mode, self._opened = "text", ""
        return True

    # ---- what is no call as calls are usually written ------------------------------------------------------------

    def _may_begin(self) -> bool:
        """Whether what is held may become a call where nothing announces one."""
        held = self._held.lstrip()
        if self._form.bare:
            return len(held) <= 200 and not re.search(r"[\s{]", held)
        held = held.removeprefix("[").lstrip() if self._form.listed else held
        if not held.startswith("{"):
            return not held
        key = held[1:].lstrip()
        return any(key.startswith(first) or first.startswith(key) for first in _FIRST_KEYS)

    def _give_up(self, found: list[Part]) -> None:
        """What is held is text, and what opened it too."""
        text = self._opened + self._held
        if text:
            found.append(text)
        self._held, self._opened, self._mode = "", "", "text"

    def _whole(self, body: str, found: list[Part], *, closed: str = "") -> None:
        """The calls in a body that is complete but written in another order; without one it stays text."""
        calls = _read_calls(body)
        if not calls or any(name not in self._functions for name, _ in calls):
            text = self._opened + body + closed
            if text:
                found.append(text)
            return
        for name, arguments in calls:
            found += [CallBegins(self.calls, name), CallArguments(self.calls, arguments)]
            self.calls += 1


def _read_calls(body: str) -> list[tuple[str, str]]:
    """Names and arguments of one call or a list of them; empty for anything else."""
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError):
        return []
    found = []
    for one in tree if isinstance(tree, list) else [tree]:
        call: Any = one.get("function", one) if isinstance(one, dict) else None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return []
        arguments = call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, str):
            found.append((call["name"], arguments))
        elif isinstance(arguments, dict):
            found.append((call["name"], json.dumps(arguments, ensure_ascii=False)))
        else:
            return []
    return found
