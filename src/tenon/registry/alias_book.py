"""The aliases of one adapter, moved, rolled back and guarded under its lock.

Whoever looked at an alias before may give its tag: nothing is changed when it is not what it was.

This module does not know where adapters lie, what a version is, nor who counts what an alias does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tenon.errors import AdapterError
from tenon.registry.aliases import ABSENT, Alias, Guard, RolledBack, Target, read_aliases, write_aliases
from tenon.registry.lock import locked


@dataclass(frozen=True, slots=True)
class AliasBook:
    """The aliases of the adapter `name` in a folder. require: raises AdapterError for a version that does not exist."""

    name: str
    folder: Path
    require: Callable[[int], None]

    def get(self, alias: str) -> Alias:
        """What an alias is now. Raises AdapterError adapter-alias-unknown."""
        return self._known(read_aliases(self.folder), alias)

    def move(
        self,
        alias: str,
        target: Target,
        *,
        allow: Callable[[Alias, Target], None] | None = None,
        tag: str | None = None,
    ) -> Alias:
        """Let an alias stand for a target from now on. allow: sees what it stands for, and raises where it may not.

        Raises AdapterError adapter-unknown, adapter-alias-moved, and what `allow` raises.
        """
        with locked(self.folder):
            aliases = self._read(alias, tag)
            if alias in aliases and allow is not None:
                allow(aliases[alias], target)
            self._require_all(target)
            moved = aliases[alias].moved(target) if alias in aliases else Alias(target=target)
            write_aliases(self.folder, aliases | {alias: moved})
        return moved

    def roll_back(
        self, alias: str, reason: str, *, expected: Target | None = None, tag: str | None = None
    ) -> Alias | None:
        """Let an alias stand for what it stood for before, and keep the reason.

        expected: only if it still stands for this; else nothing is changed and the answer is None.
        Raises AdapterError adapter-alias-unknown, adapter-alias-moved, adapter-no-way-back; adapter-unknown for a
        version removed since.
        """
        with locked(self.folder):
            aliases = self._read(alias, tag)
            if expected is not None and (alias not in aliases or aliases[alias].target != expected):
                return None
            known = self._known(aliases, alias)
            if not known.before:
                raise AdapterError(
                    "adapter-no-way-back",
                    f"{self.name}@{alias} never stood for anything else",
                    got=known.target.describe(),
                    hint=f"move it: tenon adapters alias {self.name}@{alias} VERSION",
                )
            now = time.time()
            target = known.before[0].model_copy(update={"since": now})
            self._require_all(target)
            moved = known.moved(target, RolledBack(left=known.target, reason=reason, at=now))
            write_aliases(self.folder, aliases | {alias: moved})
        return moved

    def guard(self, alias: str, guard: Guard | None) -> Alias:
        """Set or take away an alias's guard. Raises AdapterError adapter-alias-unknown."""
        with locked(self.folder):
            aliases = read_aliases(self.folder)
            guarded = self._known(aliases, alias).model_copy(update={"guard": guard})
            write_aliases(self.folder, aliases | {alias: guarded})
        return guarded

    def forget(self, alias: str, *, tag: str | None = None) -> None:
        """Remove an alias. Raises AdapterError adapter-alias-unknown, adapter-alias-moved."""
        with locked(self.folder):
            aliases = self._read(alias, tag)
            self._known(aliases, alias)
            write_aliases(self.folder, {other: kept for other, kept in aliases.items() if other != alias})

    def _read(self, alias: str, tag: str | None) -> dict[str, Alias]:
        """All aliases. Raises AdapterError adapter-alias-moved where this one has another tag than is expected."""
        aliases = read_aliases(self.folder)
        found = aliases[alias].tag if alias in aliases else ABSENT
        if tag is not None and tag != found:
            stands = aliases[alias].target.describe() if alias in aliases else "nothing"
            raise AdapterError(
                "adapter-alias-moved",
                f"{self.name}@{alias} was changed by somebody else in the meantime",
                got=f"it stands for {stands} now",
                hint="look at it again, and change it if that is still right",
            )
        return aliases

    def _require_all(self, target: Target) -> None:
        for version in sorted(target.versions):
            self.require(version)

    def _known(self, aliases: dict[str, Alias], alias: str) -> Alias:
        if alias not in aliases:
            raise AdapterError(
                "adapter-alias-unknown",
                f"{self.name} has no alias {alias!r}",
                got=f"its aliases: {', '.join(sorted(aliases)) or 'none'}",
                hint=f"set it: tenon adapters alias {self.name}@{alias} VERSION",
            )
        return aliases[alias]
