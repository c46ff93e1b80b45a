"""The fields of the recipe as a list: for its reference page, for what was mistyped, and for what explains a plan.

This module knows no values, only the schema.
"""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from tenon.recipe.schema import Recipe, Section, Source
from tenon.values import Value


class LeafField(Value):
    """One field of the recipe: its dotted key, its type in words, and its description."""

    key: str
    kind: str
    description: str
    required: bool


def section_names() -> tuple[str, ...]:
    """The recipe's sections, in order."""
    return tuple(name for name, info in Recipe.model_fields.items() if _section_of(info.annotation) is not None)


def full_key(key: str, value: Any) -> str:
    """The key that a section's name stands for where a word is written in the place of the section."""
    if key != "precision" or isinstance(value, dict):
        return key
    return "precision.base" if value in ("same", "fp8", "int8", "nf4") else "precision.compute"


def leaf_fields() -> tuple[LeafField, ...]:
    """Every field of the recipe that holds a value, by dotted key, in the order of the schema."""
    leaves: list[LeafField] = []
    for name, info in Recipe.model_fields.items():
        section = _section_of(info.annotation)
        if section is None:
            leaves.append(_leaf(info.alias or name, info))
            continue
        leaves.extend(_leaf(f"{name}.{inner}", field) for inner, field in section.model_fields.items())
    return tuple(leaves)


def source_fields() -> tuple[LeafField, ...]:
    """The fields of one source of rows."""
    return tuple(_leaf(name, info) for name, info in Source.model_fields.items())


_WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text", Source: "source"}


def _section_of(annotation: Any) -> type[Section] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _leaf(key: str, info: FieldInfo) -> LeafField:
    return LeafField(
        key=key, kind=_in_words(info.annotation), description=info.description or "", required=info.is_required()
    )


def _in_words(annotation: Any) -> str:
    """A type as a reader of YAML would say it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _in_words(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(_in_words(part) for part in arguments if part is not type(None))
    if origin is Literal:
        return ", ".join(f"`{word}`" for word in arguments)
    if origin is tuple:
        return f"list of {_in_words(arguments[0])}"
    if origin is dict:
        return "mapping of text to text"
    return _WORDS[annotation]
