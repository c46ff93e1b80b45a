"""Aliases: names such as `prod` and `canary` for versions of one adapter, moved in one instant and back again.

    NAME@prod                 version 3
    NAME@prod                 95 parts version 3, 5 parts version 4: a canary
    NAME@prod, shadow 5       version 5 is asked too, and its answers only counted
    NAME@prod, guarded        a server rolls it back when the version that was moved in fails too often

An alias is the only thing about a registered adapter that changes. It is one small file, replaced by one rename, so
that whoever reads it sees what it was before or what it is now; what it was is kept, for the way back.
This module does not know where adapters lie, nor who asks them.
"""

from __future__ import annotations

import hashlib
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
# The tag of an alias that is not there.
ABSENT = ""


class Target(Value):
    """What an alias stands for. shares: version -> parts of the requests, above zero. shadow: a version that is asked
    beside the one that answers, or None. since: unix seconds. sticky: of several versions each tenant is dealt one and
    keeps it (users that a request names always are).
    """

    shares: dict[int, float] = Field(min_length=1)
    shadow: int | None = None
    since: float = 0.0
    sticky: bool = Field(default=False, exclude_if=lambda sticky: not sticky)

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
        sticky = "; sticky" if self.sticky else ""
        return ", ".join(parts) + sticky + ("" if self.shadow is None else f"; shadow {self.shadow}")

    def part(self, version: int) -> float:
        """The version's share of all requests, 0 to 1."""
        return self.shares.get(version, 0.0) / sum(self.shares.values())


class Guard(Value):
    """What a version that an alias is moved to must keep.

    errors: largest share of requests that the version may fail, over the last `seconds`, once there were `requests` of
    them; above it servers roll the alias back. metric: a figure that entries carry; a version that is worse in it than
    the one before by more than `drop` is not let in. Each may be left out (None).
    """

    errors: float | None = Field(default=None, ge=0, lt=1)
    requests: int = Field(default=20, ge=1)
    seconds: float = Field(default=600.0, gt=0)
    metric: str | None = None
    drop: float = Field(default=0.0, ge=0)

    def describe(self) -> str:
        """`errors 5% of 20 in 600 s, accuracy 0.01`."""
        errors = "" if self.errors is None else f"errors {self.errors:.3g} of {self.requests} in {self.seconds:g} s"
        metric = "" if self.metric is None else f"{self.metric} {self.drop:g}"
        return ", ".join(filter(None, (errors, metric)))


class RolledBack(Value):
    """That an alias was rolled back. left: what it stood for; at: unix seconds."""

    left: Target
    reason: str
    at: float


class Alias(Value):
    """One alias: what it stands for, and what it stood for before, newest first.

    guard: stays through moves. rolled_back: why it stands for what it does, until it is moved again.
    """

    target: Target
    before: tuple[Target, ...] = ()
    guard: Guard | None = Field(default=None, exclude_if=lambda guard: guard is None)
    rolled_back: RolledBack | None = Field(default=None, exclude_if=lambda rolled_back: rolled_back is None)

    def moved(self, target: Target, rolled_back: RolledBack | None = None) -> Alias:
        """The alias after it was moved, or rolled back."""
        before = (self.target, *self.before)[:_MOST_KEPT]
        return Alias(target=target, before=before, guard=self.guard, rolled_back=rolled_back)

    @property
    def tag(self) -> str:
        """16 hex digits that change with everything about it."""
        return self.content_hash[:16]

    @property
    def watched(self) -> frozenset[int]:
        """The versions whose failures roll it back: those that the last move gave more of the requests.

        None after a rollback: what it went back to is not left again by itself.
        """
        if self.guard is None or self.guard.errors is None or not self.before or self.rolled_back is not None:
            return frozenset()
        grown = (version for version in self.target.shares if self.target.part(version) > self.before[0].part(version))
        return frozenset(grown)


def draw_of(*words: str) -> float:
    """A draw in [0, 1) that the same words always get: which version of an alias somebody is dealt.

    It does not depend on the shares: whoever was dealt a new version keeps it while its share grows.
    """
    digest = hashlib.sha256("\0".join(words).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


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


def new_target(shares: Mapping[int, float], shadow: int | None = None, *, sticky: bool = False) -> Target:
    """A target from now on. Raises AdapterError adapter-bad-alias."""
    try:
        return Target(shares=dict(shares), shadow=shadow, since=time.time(), sticky=sticky)
    except ValidationError as error:
        raise AdapterError(
            "adapter-bad-alias",
            "an alias stands for one version, or for several with a share each",
            got=", ".join(f"{version}:{share:g}" for version, share in shares.items()) or "nothing",
            hint="for example: tenon adapters alias NAME@prod 3, or NAME@prod 3:95 4:5",
        ) from error
