"""Recipe text and command-line overrides as flat entries: dotted key, plain value, and where it was written.

Knows YAML's shape and line numbers; does not know which keys exist beyond the names of the sections it descends into.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from tenon.errors import RecipeError

WrittenOrigin = Literal["recipe", "command line", "alias"]
COMMAND_LINE = "command line"
MAX_DEPTH = 12
MAX_NODES = 20_000


@dataclass(frozen=True, slots=True)
class Written:
    """One key with its value as it was written. where: `my.yaml:7` or `command line`."""

    key: str
    value: Any
    origin: WrittenOrigin
    where: str


class _Loader(yaml.SafeLoader):
    """SafeLoader with the numbers that people write: `2e-4` is a number, `010` and `1:30` are text."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
        r"|[0-9][0-9_]*[eE][-+]?[0-9]+)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
):
    _firsts = ["", *_first] if _tag == "null" else list(_first)
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _firsts)


def read_yaml(
    text: str, *, file: str, sections: Collection[str], full_key: Callable[[str, Any], str]
) -> tuple[Written, ...]:
    """The entries of a recipe's text, sections flattened to dotted keys, in order.

    full_key: what a key stands for with a value, where a section is written as one word.

    Raises RecipeError: recipe-empty, recipe-not-yaml, recipe-not-mapping, recipe-duplicate-key.
    """
    root = _compose(text, file=file)
    if root is None:
        raise RecipeError(
            "recipe-empty", f"{file}: the recipe is empty", hint="start from recipes/quickstart.yaml: it has ten lines"
        )
    if not isinstance(root, yaml.MappingNode):
        raise RecipeError(
            "recipe-not-mapping",
            f"{file}: a recipe is `key: value` lines, this is something else",
            got=_shape(root),
            hint="start from recipes/quickstart.yaml: it has ten lines",
        )
    reader = _Reader(file)
    entries: dict[str, Written] = {}
    for key, node, line in _flat(root, reader, sections):
        where, value = f"{file}:{line}", reader.value(node)
        key = full_key(key, value)
        if key in entries:
            raise _duplicate(key, where, entries[key].where)
        entries[key] = Written(key, value, "recipe", where)
    return tuple(entries.values())


def read_override(argument: str, full_key: Callable[[str, Any], str]) -> Written:
    """One `key=value` of the command line; the value is a YAML scalar, or a YAML list when it starts with `[`.

    Raises RecipeError: recipe-override.
    """
    key, separator, text = argument.partition("=")
    key, text = key.strip(), text.strip()
    if not separator or not key:
        raise RecipeError(
            "recipe-override",
            "an override is written key=value",
            got=repr(argument),
            hint="for example: tenon train my.yaml lora.rank=32",
        )
    if text[:1] in ("[", '"', "'"):
        node = _compose(text, file=COMMAND_LINE, code="recipe-override")
        value = None if node is None else _Reader(COMMAND_LINE).value(node)
    else:
        value = _scalar(text)
    return Written(full_key(key, value), value, COMMAND_LINE, COMMAND_LINE)


def read_overrides(arguments: Collection[str], full_key: Callable[[str, Any], str]) -> tuple[Written, ...]:
    """All overrides of a command line; a key may occur once. Raises RecipeError: recipe-duplicate-key and the above."""
    entries: dict[str, Written] = {}
    for entry in (read_override(argument, full_key) for argument in arguments):
        if entry.key in entries:
            raise _duplicate(entry.key, COMMAND_LINE, COMMAND_LINE)
        entries[entry.key] = entry
    return tuple(entries.values())


def _compose(text: str, *, file: str, code: str = "recipe-not-yaml") -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        problem = (error.problem if isinstance(error, yaml.MarkedYAMLError) else None) or "a character YAML forbids"
        place = file if mark is None or file == COMMAND_LINE else f"{file}:{mark.line + 1}"
        raise RecipeError(code, f"{place}: this is not YAML: {problem}", hint=_YAML_HINT) from error
    except RecursionError as error:
        raise RecipeError(code, f"{file}: this is not YAML: nested too deeply", hint=_YAML_HINT) from error


_PLAIN_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
_YAML_HINT = "write `key: value` lines, sections indented by two spaces, text with a colon in quotes"


def _flat(root: yaml.MappingNode, reader: _Reader, sections: Collection[str]) -> Iterator[tuple[str, yaml.Node, int]]:
    """(dotted key, value, line) of every entry; an empty section has none."""
    for key, node, line in reader.items(root):
        if key not in sections or not isinstance(node, yaml.MappingNode):
            if not (key in sections and _is_null(node)):
                yield key, node, line
            continue
        for inner, value, inner_line in reader.items(node):
            yield f"{key}.{inner}", value, inner_line


class _Reader:
    """Nodes to plain values; counts them, so that a small file cannot unfold into a large tree."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._nodes = 0

    def items(self, node: yaml.MappingNode) -> list[tuple[str, yaml.Node, int]]:
        """(key as text, value, line) of a mapping; a key that occurs twice is an error."""
        seen: dict[str, tuple[str, yaml.Node, int]] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            where = self._file if self._file == COMMAND_LINE else f"{self._file}:{line}"
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError("recipe-not-yaml", f"{where}: a key must be one word", hint=_YAML_HINT)
            if key_node.value in seen:
                raise _duplicate(key_node.value, where, f"line {seen[key_node.value][2]}")
            seen[key_node.value] = (key_node.value, value_node, line)
        return list(seen.values())

    def value(self, node: yaml.Node, depth: int = 0) -> Any:
        """The plain value of a node: mapping, list or scalar."""
        self._nodes += 1
        if depth > MAX_DEPTH or self._nodes > MAX_NODES:
            raise RecipeError(
                "recipe-not-yaml", f"{self._file}: nested too deeply, or too many entries", hint=_YAML_HINT
            )
        if isinstance(node, yaml.CollectionNode) and node.tag not in _PLAIN_TAGS:
            raise RecipeError(
                "recipe-not-yaml", f"{self._file}: tags are not understood", got=node.tag, hint=_YAML_HINT
            )
        if isinstance(node, yaml.MappingNode):
            return {key: self.value(child, depth + 1) for key, child, _ in self.items(node)}
        if isinstance(node, yaml.SequenceNode):
            return [self.value(child, depth + 1) for child in node.value]
        return _construct(node, self._file)


def _construct(node: yaml.Node, file: str) -> Any:
    loader = _Loader("")
    try:
        return loader.construct_object(node)
    except (yaml.YAMLError, ValueError) as error:
        where = file if file == COMMAND_LINE else f"{file}:{node.start_mark.line + 1}"
        raise RecipeError(
            "recipe-not-yaml", f"{where}: this value cannot be read", got=_short(node.value), hint=_YAML_HINT
        ) from error
    finally:
        loader.dispose()


def _scalar(text: str) -> Any:
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    try:
        return loader.construct_object(yaml.ScalarNode(tag, text))
    finally:
        loader.dispose()


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _duplicate(key: str, where: str, first: str) -> RecipeError:
    return RecipeError(
        "recipe-duplicate-key",
        f"{where}: `{key}` is written twice (first: {first})",
        hint="keep one of the two",
    )


def _shape(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else _short(node.value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
