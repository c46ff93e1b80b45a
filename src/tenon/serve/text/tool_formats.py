"""How families of models write calls of functions: a table, chosen by what their chat template says, and its grammars.

| format | a call |
|---|---|
| hermes | `<tool_call>{"name": …, "arguments": {…}}</tool_call>`: Hermes, Qwen 2.5 and 3, SmolLM2 (a list), SmolLM3 |
| mistral | `[TOOL_CALLS] [{"name": …, "arguments": {…}}]` |
| mistral-args | `[TOOL_CALLS]name[ARGS]{…}` |
| llama | `{"name": …, "parameters": {…}}`, which begins the answer: Llama 3.1 and later |

This module parses no answers (see tool_calls).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import StructTag

from tenon.data.schemas import inner_schema, schema_rule
from tenon.data.tokenizer import ChatTokenizer

ANY_ARGUMENTS: dict[str, Any] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class CallFormat:
    """One way to write calls. opens, closes: around calls; empty where nothing is. key: of the arguments. listed: calls
    stand in a list. bare: name and arguments stand without braces around them, with this between them.
    """

    name: str
    opens: str
    closes: str
    key: str
    listed: bool = False
    bare: str = ""

    @property
    def joins(self) -> str:
        """What stands between two calls of one answer; empty where there can be one alone."""
        if self.listed:
            return ", "
        return "\n" if self.closes else ""


HERMES = CallFormat("hermes", "<tool_call>", "</tool_call>", "arguments")
MISTRAL = CallFormat("mistral", "[TOOL_CALLS]", "", "arguments", listed=True)
MISTRAL_ARGS = CallFormat("mistral-args", "[TOOL_CALLS]", "", "arguments", bare="[ARGS]")
LLAMA = CallFormat("llama", "", "", "parameters")

# What a template with tools holds, and what it must not hold; the first that fits.
_TABLE: tuple[tuple[CallFormat, tuple[str, ...], tuple[str, ...]], ...] = (
    (MISTRAL_ARGS, ("[TOOL_CALLS]", "[ARGS]"), ()),
    (MISTRAL, ("[TOOL_CALLS]",), ()),
    (HERMES, ("<tool_call>",), ("<function=", "<arg_key>")),
    (LLAMA, ("<|python_tag|>",), ()),
    (LLAMA, ('"parameters": dictionary of argument name',), ()),
)


def call_format(template: str) -> CallFormat | None:
    """The format that a chat template with tools asks for; None: another one than those of the table."""
    return next(
        (
            form
            for form, needs, lacks in _TABLE
            if all(text in template for text in needs) and not any(text in template for text in lacks)
        ),
        None,
    )


@dataclass(frozen=True, slots=True)
class Function:
    """A function that may be called. schema: of its arguments, where they are held to it; else any object."""

    name: str
    schema: dict[str, Any]


class CallGrammar:
    """Grammars of calls in one format, over one vocabulary."""

    def __init__(self, form: CallFormat, tokenizer: ChatTokenizer) -> None:
        self._form, self._tokenizer = form, tokenizer

    def calls(self, functions: Sequence[Function], *, several: bool, answer: dict[str, Any] | None = None) -> str:
        """At least one call and nothing else; only one unless `several`. answer: or else the JSON of this schema.

        Raises UsageError usage-grammar.
        """
        form = self._form
        rules = [self._call(number, function) for number, function in enumerate(functions)]
        one = "(" + " | ".join(f"call_{number}" for number in range(len(functions))) + ")"
        if form.listed:
            more = f"({_text(form.joins)} {one})*" if several else ""
            whole = f'{self._marks(form.opens)} " "? "[" {one} {more} "]"'
        elif form.closes:
            framed = f'{self._marks(form.opens)} "\\n" {one} "\\n" {self._marks(form.closes)}'
            whole = f"{framed} ({_text(form.joins)} {framed})*" if several else framed
        else:
            framed = f"{self._marks(form.opens)} {one}"
            whole = f"({framed})+" if several and form.bare else framed
        choices = "start: calls" if answer is None else f"start: calls | answer\nanswer: {schema_rule(answer)}"
        return "\n".join(["%llguidance {}", choices, f"calls: {whole}", *rules])

    def perhaps(self, functions: Sequence[Function]) -> str | None:
        """Any text, in which calls are as they have to be; None where the format's calls cannot be told from text."""
        form = self._form
        if not form.opens or form.listed or form.bare or self._special(form.opens) is not None:
            return None
        tags = [
            StructTag(
                trigger=form.opens,
                begin=f"{form.opens}\n{self._head(function.name)}",
                grammar=inner_schema(function.schema),
                end=f"}}\n{form.closes}",
            )
            for function in functions
        ]
        return StructTag.to_grammar(tags, assume_special=False)

    def _call(self, number: int, function: Function) -> str:
        rule = f"args_{number}: {schema_rule(function.schema)}"
        if self._form.bare:
            return f"call_{number}: {_text(function.name)} {self._marks(self._form.bare)} args_{number}\n{rule}"
        return f'call_{number}: {_text(self._head(function.name))} args_{number} "}}"\n{rule}'

    def _head(self, name: str) -> str:
        return f'{{"name": {json.dumps(name)}, {json.dumps(self._form.key)}: '

    def _marks(self, text: str) -> str:
        """A mark of the format: its token where it is a special one, else its letters."""
        special = self._special(text)
        if special is not None:
            return f"<[{special}]>"
        return _text(text) if text else ""

    def _special(self, text: str) -> int | None:
        index = self._tokenizer.token_id(text) if text else None
        return index if index in self._tokenizer.special_ids else None


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
