"""The registered adapters as a user has them. This module does not know screens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tenon.errors import AdapterError
from tenon.plan.values import Generation
from tenon.registry.aliases import Alias, Guard
from tenon.registry.entry import Entry, EntryDraft
from tenon.registry.entry_files import TEMPLATE_NAME
from tenon.registry.store import Registry
from tenon.runs.metric_table import metric_facts
from tenon.settings import Settings


def list_entries(settings: Settings, on_damaged: Callable[[AdapterError], None]) -> tuple[Entry, ...]:
    """Every version of every adapter. on_damaged: told each that cannot be read, which is then left out."""
    return Registry(settings.registry).list(on_damaged=on_damaged)


def get_entry(name: str, settings: Settings) -> Entry:
    """One version. Raises AdapterError adapter-unknown, adapter-damaged."""
    return Registry(settings.registry).get(name)


def entry_folder(entry: Entry, settings: Settings) -> Path:
    """Where its files lie."""
    return Registry(settings.registry).folder(entry)


def verify_entries(name: str | None, settings: Settings) -> Iterator[Entry]:
    """Check one version, or all of them, one after the other. Raises AdapterError for the first that is not whole."""
    registry = Registry(settings.registry)
    labels = (
        [name] if name else [f"{each}@{version}" for each in registry.names() for version in registry.versions(each)]
    )
    for label in labels:
        yield registry.verify(label)


def export_entry(name: str, folder: Path, settings: Settings) -> Entry:
    """Write a version as a folder that PEFT and vLLM load. Raises AdapterError; RunError run-disk-full."""
    return Registry(settings.registry).export(name, folder)


def import_folder(
    name: str,
    folder: Path,
    base: str,
    settings: Settings,
    *,
    template: Path | None = None,
    system: str | None = None,
    generation: Generation | None = None,
) -> Entry:
    """Register a PEFT folder that was made elsewhere, for a base that is found and hashed now.

    template: file of the chat template that it was trained with; else the folder's own chat_template.jinja, if it has
    one, else the base's. system, generation: see `EntryDraft`.
    Raises AdapterError; DataError data-template-file, data-template-syntax.
    """
    # Only this function needs to know bases and templates, and listing adapters is to be instant.
    from tenon.service.bases import describe_base

    beside = _template_file(folder / TEMPLATE_NAME if template is None else template, required=template is not None)
    found = describe_base(base, settings)
    draft = EntryDraft(base_spec=base, base_hash=found.base_hash, system=system, generation=generation or Generation())
    return Registry(settings.registry).register(name, folder, draft, beside=beside)


def _template_file(place: Path, *, required: bool) -> dict[str, bytes]:
    """A chat template as a file to keep; nothing where there is none."""
    from tenon.data.template import ChatTemplate, read_template

    if not required and not place.is_file():
        return {}
    source = read_template(str(place)) or ""
    ChatTemplate(source, named_tokens={})
    return {TEMPLATE_NAME: source.encode()}


def label_of(name: str, settings: Settings) -> str:
    """NAME@VERSION of what a name means, readable or not. Raises AdapterError adapter-unknown."""
    registry = Registry(settings.registry)
    return name if name in registry.labels() else registry.get(name).label


def remove_entry(name: str, settings: Settings) -> str:
    """Remove a version for good, even a damaged one; returns its label."""
    return Registry(settings.registry).remove(name)


def list_aliases(settings: Settings, name: str | None = None) -> dict[str, Alias]:
    """Every alias as NAME@ALIAS, of one adapter or of all. Raises AdapterError adapter-damaged."""
    registry = Registry(settings.registry)
    names = registry.names() if name is None else (name,)
    return {f"{each}@{alias}": found for each in names for alias, found in sorted(registry.aliases(each).items())}


def set_alias(
    spec: str,
    versions: Sequence[str],
    shadow: int | None,
    settings: Settings,
    *,
    sticky: bool = False,
    force: bool = False,
) -> Alias:
    """Let NAME@ALIAS stand for `3`, or for several versions with their shares, `3:95` and `4:5`.

    sticky: each tenant keeps the version that it is dealt. force: also against its guard's metric.
    Raises AdapterError adapter-bad-alias, adapter-unknown, adapter-guard.
    """
    shares = dict(_share(word) for word in versions)
    return Registry(settings.registry).set_alias(spec, shares, shadow, sticky=sticky, force=force)


def guard_alias(spec: str, guard: Guard | None, settings: Settings) -> Alias:
    """Set or take away the guard of NAME@ALIAS.

    Raises AdapterError adapter-alias-unknown; RecipeError recipe-metric-unknown.
    """
    if guard is not None and guard.metric is not None:
        metric_facts(guard.metric, key="--metric")
    return Registry(settings.registry).guard_alias(spec, guard)


def roll_back_alias(spec: str, settings: Settings) -> Alias:
    """Let NAME@ALIAS stand for what it stood for before. Raises AdapterError adapter-no-way-back."""
    return Registry(settings.registry).roll_back(spec)


def remove_alias(spec: str, settings: Settings) -> None:
    """Forget NAME@ALIAS. Raises AdapterError adapter-alias-unknown."""
    Registry(settings.registry).remove_alias(spec)


def _share(word: str) -> tuple[int, float]:
    """(version, parts) of `3` or `3:95`."""
    found = re.fullmatch(r"([1-9]\d{0,8})(?::(\d+(?:\.\d+)?))?", word)
    if found is None:
        raise AdapterError(
            "adapter-bad-alias",
            "an alias stands for one version, or for several with a share each",
            got=repr(word),
            hint="for example: tenon adapters alias NAME@prod 3, or NAME@prod 3:95 4:5",
        )
    return int(found[1]), float(found[2] or 1.0)
