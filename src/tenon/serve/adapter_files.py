"""The files of a registered version, read for the bank. This module does not know slots, names or requests."""

from __future__ import annotations

from dataclasses import dataclass

from tenon.adapters.peft_files import AdapterFiles, parse_adapter
from tenon.errors import AdapterError
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
            raise AdapterError(
                "adapter-damaged",
                f"{adapter.label}: its files cannot be read",
                got=str(error.strerror),
                hint="use another version",
            ) from error
        return parse_adapter(self.registry.folder(entry), contents)
