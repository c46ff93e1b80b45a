"""The files of a registered version, read for the bank. This module does not know slots, names or requests."""

from __future__ import annotations

from dataclasses import dataclass

from tenon.adapters.peft_files import AdapterFiles, parse_adapter
from tenon.errors import AdapterError
from tenon.registry.probes import Probes
from tenon.registry.store import Registry
from tenon.serve.jobs import AdapterRef


@dataclass(frozen=True, slots=True)
class AdapterReader:
    """Reads versions from a registry: what `Residency` calls when an adapter is asked for."""

    registry: Registry

    def __call__(self, adapter: AdapterRef) -> AdapterFiles:
        """What the version holds: each file is read once, hashed, and checked as it was read. Raises AdapterError."""
        try:
            entry, contents = self.registry.read(adapter.label)
        except OSError as error:
            raise _unreadable(adapter, error) from error
        return parse_adapter(self.registry.folder(entry), contents)

    def probes(self, adapter: AdapterRef) -> Probes | None:
        """What the version said when it was trained; None where nothing was recorded. Raises AdapterError."""
        try:
            return self.registry.probes(self.registry.get(adapter.label))
        except OSError as error:
            raise _unreadable(adapter, error) from error


def _unreadable(adapter: AdapterRef, error: OSError) -> AdapterError:
    return AdapterError(
        "adapter-damaged",
        f"{adapter.label}: its files cannot be read",
        got=str(error.strerror),
        hint="use another version",
    )
