"""The registered adapters as a user has them. This module does not know screens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from tenon.errors import AdapterError
from tenon.registry.entry import Entry, EntryDraft
from tenon.registry.store import Registry
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


def import_folder(name: str, folder: Path, base: str, settings: Settings) -> Entry:
    """Register a PEFT folder that was made elsewhere, for a base that is found and hashed now."""
    # Only this function needs to know bases, and listing adapters is to be instant.
    from tenon.service.bases import describe_base

    found = describe_base(base, settings)
    return Registry(settings.registry).register(name, folder, EntryDraft(base_spec=base, base_hash=found.base_hash))


def label_of(name: str, settings: Settings) -> str:
    """NAME@VERSION of what a name means, readable or not. Raises AdapterError adapter-unknown."""
    registry = Registry(settings.registry)
    return name if name in registry.labels() else registry.get(name).label


def remove_entry(name: str, settings: Settings) -> str:
    """Remove a version for good, even a damaged one; returns its label."""
    return Registry(settings.registry).remove(name)
