"""Aliases: names such as `prod` and `canary` for versions of one adapter, moved in one instant and back again.

    NAME@prod                 version 3
    NAME@prod                 95 parts version 3, 5 parts version 4: a canary
    NAME@prod, shadow 5       version 5 is asked too, and its answers only counted

An alias is the only thing about a registered adapter that changes. It is one small file, replaced by one rename, so
that whoever reads it sees what it was before or what it is now; what it was is kept, for the way back.
This module does not know where adapters lie, nor who asks them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, ValidationError, model_validator

from tenon.errors import AdapterError
from tenon.runs.atomic import write_file_atomic
from tenon.values import Value

FILE_NAME = "aliases.json"
# `prod`, `canary`, `eu-2`: never a number, which is a version.
_ALIAS = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_MOST_KEPT = 20


class Target(Value):
    """What an alias stands for. shares: version -> parts of the requests, above zero. shadow: a version that is asked
    beside the one that answers, or None. since: unix seconds.
    """

    shares: dict[int, float] = Field(min_length=1)
    shadow: int | None = None
    since: float = 0.0

    @model_validator(mode="after")
    def _shares_are_parts(self) -> Target:
        if any(not 0.0 < share < float("inf") for share in self.shares.values()):
            raise ValueError("every share is a number above zero")
        return self

    @property
    def versions(self) -> frozenset[int]:
        """Every version that it needs."""
        return frozenset(self.shares) | (frozenset() if self.shadow is None else {self.shadow})

    @property
    def main(self) -> int:
        """The version with most parts; of equal ones the newest."""
        return max(self.shares, key=lambda version: (self.shares[version], version))

    def pick(self, draw: float) -> int:
        """The version of one request. draw: in [0, 1); equal draws pick equal versions."""
        left = draw * sum(self.shares.values())
        for version in sorted(self.shares):
            left -= self.shares[version]
            if left < 0.0:
                return version
        return max(self.shares)

    def describe(self) -> str:
        """`3`, or `3 95%, 4 5%; shadow 5`."""
        total = sum(self.shares.values())
        parts = [f"{version} {100 * share / total:.3g}%" for version, share in sorted(self.shares.items())]
        if len(parts) == 1:
            parts = [str(self.main)]
        return ", ".join(parts) + ("" if self.shadow is None else f"; shadow {self.shadow}")


class Alias(Value):
    """One alias: what it stands for, and what it stood for before, newest first."""

    target: Target
    before: tuple[Target, ...] = ()

    def moved(self, target: Target) -> Alias:
        """The alias after it was moved."""
        return Alias(target=target, before=(self.target, *self.before)[:_MOST_KEPT])


class _File(Value):
    aliases: dict[str, Alias] = Field(default_factory=dict)


def is_alias(text: str) -> bool:
    """Whether a text may be an alias."""
    return _ALIAS.fullmatch(text) is not None


def read_aliases(folder: Path) -> dict[str, Alias]:
    """The aliases of the adapter in a folder; none where there is no file. Raises AdapterError adapter-damaged."""
    path = folder / FILE_NAME
    try:
        return dict(_File.from_json(path.read_bytes()).aliases)
    except FileNotFoundError:
        return {}
    except ValidationError as error:
        raise AdapterError(
            "adapter-damaged",
            f"{path} does not hold aliases",
            got=str(error.errors()[0]["msg"]),
            hint="remove the file and set the aliases again: tenon adapters alias NAME@ALIAS VERSION",
        ) from error


def write_aliases(folder: Path, aliases: Mapping[str, Alias]) -> None:
    """Replace all aliases in one instant; whoever writes holds the adapter's lock."""
    write_file_atomic(folder / FILE_NAME, _File(aliases=dict(aliases)).to_json().encode())


def new_target(shares: Mapping[int, float], shadow: int | None = None) -> Target:
    """A target from now on. Raises AdapterError adapter-bad-alias."""
    try:
        return Target(shares=dict(shares), shadow=shadow, since=time.time())
    except ValidationError as error:
        raise AdapterError(
            "adapter-bad-alias",
            "an alias stands for one version, or for several with a share each",
            got=", ".join(f"{version}:{share:g}" for version, share in shares.items()) or "nothing",
            hint="for example: tenon adapters alias NAME@prod 3, or NAME@prod 3:95 4:5",
        ) from error
