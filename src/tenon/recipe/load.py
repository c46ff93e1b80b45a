"""A recipe file and the command line's overrides, as one Recipe with where each value came from.

Paths stay as written in the Recipe, so that its hash does not depend on where it lies; `Loaded` resolves them against
the recipe's folder. This module does not know the base, the machine or the data.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from tenon.errors import RecipeError
from tenon.recipe.aliases import PAIRS
from tenon.recipe.applies import refuse_inapplicable
from tenon.recipe.fields import LeafField, full_key, leaf_fields, section_names, source_fields
from tenon.recipe.nearest import did_you_mean, nearest_keys, nearest_word
from tenon.recipe.schema import Recipe
from tenon.recipe.translate import refuse_overridden_epochs, translate
from tenon.recipe.written import Written, WrittenOrigin, read_overrides, read_yaml
from tenon.values import Value

MAX_RECIPE_BYTES = 1_000_000
_QUICKSTART = "start from recipes/quickstart.yaml: it has ten lines"
_ARTICLES = {"whole number": "a whole number", "number": "a number"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DATA_FILE = re.compile(r"\.(jsonl?|csv|tsv|txt|parquet)(\.\w+)?$", re.IGNORECASE)


class Given(Value):
    """One value that somebody wrote. where: `my.yaml:7`, `command line`, or `my.yaml:7, as lora_r`."""

    key: str
    origin: WrittenOrigin
    where: str


class Loaded(Value):
    """A recipe with where its values came from.

    file, folder: of the recipe. working_folder: where the command was typed. text: the file as it was read.
    always: entries of other tools that say what Tenon does anyway.
    """

    recipe: Recipe
    file: str
    folder: str
    working_folder: str
    text: str
    overrides: tuple[str, ...] = ()
    given: tuple[Given, ...] = ()
    always: tuple[Given, ...] = ()

    def origin(self, key: str) -> Given | None:
        """Who wrote a key, or None when it was left to the planner."""
        return next((given for given in self.given if given.key == key), None)

    def resolve(self, path: str) -> str:
        """A path of the recipe as an absolute one: relative to the recipe's folder, `~` is the home folder."""
        return os.path.normpath(Path(self.folder) / Path(path).expanduser())

    def resolve_source(self, path: str) -> str:
        """A source of rows: a path made absolute, or a hub id (or a URL) as it stands."""
        if "://" in path:
            return path
        is_id = _HUB_ID.fullmatch(path) and not _DATA_FILE.search(path)
        return path if is_id and not Path(self.resolve(path)).exists() else self.resolve(path)

    @property
    def base_spec(self) -> str:
        """The base as `locate_base` takes it: a path made absolute, a name or a hub id as it stands."""
        spec = self.recipe.base
        is_path = spec.startswith((".", "/", "~")) or spec.endswith(".gguf") or Path(self.resolve(spec)).exists()
        return self.resolve(spec) if is_path else spec


def load_recipe(path: Path, overrides: Sequence[str] = (), *, working_folder: Path | None = None) -> Loaded:
    """Read a recipe file; overrides are `key=value` as typed on the command line.

    Raises RecipeError: recipe-missing, recipe-not-a-file, recipe-too-large, recipe-encoding, and what `parse_recipe`
    raises.
    """
    return parse_recipe(
        _read(path),
        overrides,
        file=path.absolute(),
        working_folder=(working_folder or Path.cwd()).absolute(),
    )


def parse_recipe(text: str, overrides: Sequence[str] = (), *, file: Path, working_folder: Path) -> Loaded:
    """A recipe from its text.

    Raises RecipeError: recipe-empty, recipe-not-yaml, recipe-not-mapping, recipe-duplicate-key, recipe-override,
    recipe-unknown-key, recipe-missing-key, recipe-bad-value, recipe-inapplicable, recipe-alias-differs,
    recipe-alias-clash.
    """
    written = read_yaml(text, file=file.name, sections=section_names(), full_key=full_key)
    in_file = {entry.key: entry for entry in written}
    typed = {entry.key: entry for entry in read_overrides(overrides, full_key)}
    entries, always = _merge(in_file, typed)
    _refuse_unknown(entries.values())
    entries = {key: entry for key, entry in entries.items() if entry.value is not None}
    recipe = _validate(entries)
    refuse_inapplicable(recipe, {key: entry.where for key, entry in entries.items()})
    return Loaded(
        recipe=recipe,
        file=str(file),
        folder=str(file.parent),
        working_folder=str(working_folder),
        text=text,
        overrides=tuple(overrides),
        given=tuple(map(_given, entries.values())),
        always=tuple(map(_given, always)),
    )


def _read(path: Path) -> str:
    if not path.exists():
        raise RecipeError("recipe-missing", f"there is no recipe at {path}", hint=_QUICKSTART)
    if not path.is_file():
        raise RecipeError("recipe-not-a-file", f"{path} is not a file", hint="name the .yaml file")
    size_bytes = path.stat().st_size
    if size_bytes > MAX_RECIPE_BYTES:
        raise RecipeError(
            "recipe-too-large",
            f"{path} is too large for a recipe",
            got=f"{size_bytes:,} bytes",
            hint="name the recipe, not its data",
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            "recipe-encoding",
            f"{path} is not UTF-8 text (byte {error.start})",
            hint=f"convert it: iconv -f ENCODING -t UTF-8 {path.name}",
        ) from error
    except OSError as error:
        raise RecipeError(
            "recipe-missing", f"{path} cannot be read: {error.strerror}", hint="check the file's permissions"
        ) from error


def _merge(in_file: Mapping[str, Written], typed: Mapping[str, Written]) -> tuple[dict[str, Written], list[Written]]:
    """The command line over the file, other tools' keys under ours."""
    both = {**in_file, **typed}
    refuse_overridden_epochs(both)
    # A step's rows are a product: when one factor is typed, the other may stand in the file.
    groups = [group for group in PAIRS if any(key in typed for key in group)]
    paired = {key: both[key] for group in groups for key in group if key in both}
    lower = translate({key: entry for key, entry in in_file.items() if key not in typed and key not in paired})
    upper = translate({**typed, **paired})
    entries = {entry.key: entry for entry in (*lower.entries, *upper.entries)}
    return entries, [*lower.always, *upper.always]


def _refuse_unknown(entries: Iterable[Written]) -> None:
    known = {leaf.key for leaf in leaf_fields()}
    for entry in entries:
        if entry.key in known:
            continue
        if entry.key in section_names():
            raise RecipeError(
                "recipe-bad-value",
                f"{entry.where}: `{entry.key}` is a section; its keys stand below it, indented",
                got=_short(entry.value),
                hint=f"its keys: {', '.join(key for key in sorted(known) if key.startswith(entry.key + '.'))}",
            )
        raise RecipeError(
            "recipe-unknown-key",
            f"{entry.where}: there is no key `{entry.key}`",
            hint=did_you_mean(nearest_keys(entry.key), "docs/recipe.md lists every key"),
        )


def _validate(entries: Mapping[str, Written]) -> Recipe:
    tree: dict[str, Any] = {"data": {}}
    for key, entry in entries.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = entry.value
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise _bad_value(error.errors()[0], entries) from error


def _bad_value(detail: ErrorDetails, entries: Mapping[str, Written]) -> RecipeError:
    """pydantic's first complaint, in our words."""
    leaves = {leaf.key: leaf for leaf in leaf_fields()}
    parts = [str(part) for part in detail["loc"]]
    key = next(name for name in (".".join(parts[:2]), parts[0]) if name in leaves)
    leaf = leaves[key]
    if detail["type"] == "missing" and key not in entries:
        return RecipeError(
            "recipe-missing-key", f"the recipe has no `{key}`", hint=f"add {key}: {leaf.description.rstrip('.')}"
        )
    inner = _inner(parts[key.count(".") + 1 :])
    where = f"{entries[key].where}: `{key}{inner}`"
    if detail["type"] == "extra_forbidden":
        names = [field.key for field in source_fields()]
        near = nearest_word(parts[-1], names)
        return RecipeError(
            "recipe-unknown-key",
            f"{where}: a source has no key `{parts[-1]}`",
            hint=did_you_mean([near] if near else [], f"its keys are {', '.join(names)}"),
        )
    return RecipeError(
        "recipe-bad-value", f"{where} {_complaint(detail, leaf)}", got=_got(detail), hint=_remedy(detail, leaf)
    )


def _inner(parts: Sequence[str]) -> str:
    """Where inside the value: `[1].weight`. Names of pydantic's union branches are left out."""
    fields = {field.key for field in source_fields()}
    kept = [part for part in parts if part.isdigit() or part in fields]
    return "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in kept)


def _complaint(detail: ErrorDetails, leaf: LeafField) -> str:
    if detail["type"] == "missing":
        return "is missing"
    if detail["type"].endswith("_type") and "source" not in leaf.kind:
        return f"must be {_ARTICLES.get(leaf.kind, leaf.kind)}"
    message = detail["msg"].removeprefix("Input ").removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _remedy(detail: ErrorDetails, leaf: LeafField) -> str:
    if detail["type"] == "literal_error" and isinstance(detail["input"], str):
        words = re.findall(r"`([^`]+)`", leaf.kind)
        near = nearest_word(detail["input"], words)
        return did_you_mean([near] if near else [], f"one of {', '.join(words)}")
    return f"{leaf.key}: {leaf.description}"


def _got(detail: ErrorDetails) -> str:
    return "" if detail["type"] == "missing" else _short(detail["input"])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _given(entry: Written) -> Given:
    return Given(key=entry.key, origin=entry.origin, where=entry.where)
