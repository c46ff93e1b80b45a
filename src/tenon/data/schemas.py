"""JSON schemas as grammars, after a look at every keyword: what would not be kept is refused, never ignored.

This module does not know tokens, and not who compiles the grammar.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from llguidance import LLMatcher

from tenon.errors import UsageError

LONGEST_SCHEMA = 65_536
MOST_SCHEMAS = 1_000
DEEPEST_SCHEMA = 32

_KEPT = frozenset((
    "type", "enum", "const", "properties", "required", "additionalProperties", "patternProperties", "minProperties",
    "maxProperties", "items", "prefixItems", "minItems", "maxItems", "anyOf", "oneOf", "allOf", "$ref", "$defs",
    "definitions", "pattern", "format", "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum",
    "exclusiveMaximum", "multipleOf",
))  # fmt: skip
# They say nothing about which values are valid.
_REMARKS = frozenset((
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema", "$id",
    "discriminator",
))  # fmt: skip
_ONE = ("additionalProperties", "items")
_SEVERAL = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
# Space between the parts of an answer: enough for any indentation, too little to go on for ever.
_STYLE: Any = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n\t]{0,24}"}
# Inside a larger grammar: as calls of functions are written in training.
_CLOSE: Any = {"whitespace_flexible": True, "whitespace_pattern": "[ ]?"}


def schema_grammar(schema: dict[str, Any]) -> str:
    """The grammar of all JSON texts that a schema allows. Raises UsageError usage-grammar: see `check_schema`."""
    return LLMatcher.grammar_from_json_schema(check_schema(schema), overrides=_STYLE)


def schema_rule(schema: dict[str, Any]) -> str:
    """A schema as the right side of a rule of a larger grammar in Lark. Raises as `schema_grammar`."""
    return f"%json {json.dumps(inner_schema(schema), ensure_ascii=False)}"


def inner_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema as it stands in a larger grammar: with little space between its parts. Raises as `schema_grammar`."""
    check_schema(schema)
    return {**schema, "x-guidance": _CLOSE}


def check_schema(schema: dict[str, Any]) -> str:
    """The schema as text.

    Raises UsageError usage-grammar, naming the place: a keyword that would not be kept, or more than the limits.
    """
    text = json.dumps(schema, ensure_ascii=False)
    if len(text) > LONGEST_SCHEMA:
        raise _unfit(f"it has {len(text):,} characters, and at most {LONGEST_SCHEMA:,} are read")
    waiting: list[tuple[str, Any, int]] = [("$", schema, 1)]
    seen = 0
    while waiting:
        place, value, depth = waiting.pop()
        seen += 1
        if seen > MOST_SCHEMAS:
            raise _unfit(f"it has more than {MOST_SCHEMAS:,} parts")
        if depth > DEEPEST_SCHEMA:
            raise _unfit(f"it is nested more than {DEEPEST_SCHEMA} deep, at {place[:200]}")
        if isinstance(value, bool):
            continue
        if not isinstance(value, dict):
            raise _unfit(f"{place} is neither an object nor true or false")
        for keyword in value:
            if keyword not in _KEPT and keyword not in _REMARKS:
                raise _unfit(f"the keyword {keyword[:100]!r} at {place} is not supported")
        waiting += [(where, part, depth + 1) for where, part in _parts(place, value)]
    return text


def _parts(place: str, schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas inside a schema, with where they stand."""
    for keyword in _ONE:
        if keyword in schema:
            yield f"{place}.{keyword}", schema[keyword]
    for keyword in _SEVERAL:
        listed = schema.get(keyword, [])
        if not isinstance(listed, list):
            raise _unfit(f"{place}.{keyword} is not a list")
        for number, part in enumerate(listed):
            yield f"{place}.{keyword}[{number}]", part
    for keyword in _NAMED:
        named = schema.get(keyword, {})
        if not isinstance(named, dict):
            raise _unfit(f"{place}.{keyword} is not an object")
        for name, part in named.items():
            yield f"{place}.{keyword}.{name[:50]}", part


def _unfit(reason: str) -> UsageError:
    return UsageError(
        "usage-grammar",
        f"the JSON schema cannot be kept: {reason}",
        hint="change the schema; docs/serving.md lists the keywords and limits",
    )
