"""Answers that are to be JSON: whether they parse, and how many of their fields are right.

A field is a leaf of the tree with its path: `items[2].price`. This module does not know schemas.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

_MISSING = object()


def parse_json(text: str) -> Any | None:
    """The object or array that a text holds, spaces at the ends apart; None for anything else.

    A bare number or word is no JSON answer here, and NaN and Infinity are no JSON at all.
    """
    try:
        tree = json.loads(text.strip(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict | list) else None


def is_json(text: str) -> bool:
    """Whether a text is a JSON object or array."""
    return parse_json(text) is not None


def field_accuracy(expected: str, got: str) -> float:
    """Fields of the answer that are right, as a share of all fields that either tree has.

    A missing field, a wrong value, and a field that should not be there count as wrong alike; so does everything in
    an answer that is no JSON. The order of keys means nothing, that of lists does. 1 and 1.0 are the same number;
    true and 1 are not the same.
    """
    wanted, found = dict(_fields(parse_json(expected))), dict(_fields(parse_json(got)))
    paths = wanted.keys() | found.keys()
    right = sum(_same(wanted.get(path, _MISSING), found.get(path, _MISSING)) for path in paths)
    return right / len(paths)


def _fields(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every leaf; empty objects and lists are leaves."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _fields(value, f"{path}.{json.dumps(key)}")
    elif isinstance(tree, list) and tree:
        for i, value in enumerate(tree):
            yield from _fields(value, f"{path}[{i}]")
    else:
        yield path, tree


def _same(a: object, b: object) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
