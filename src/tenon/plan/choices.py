"""Collects what was decided: each value with its recipe key, where it came from, and the reason.

The planner takes every value of the recipe through here, so that `tenon recipe explain` can show them all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from tenon.plan.values import Choice, Rejection
from tenon.recipe.defaults import DEFAULTS
from tenon.recipe.load import Loaded

T = TypeVar("T")


class Choices:
    """The choices and rejections of one plan, in the order in which they were made."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self.made: list[Choice] = []
        self.rejected: list[Rejection] = []

    def default(self, key: str, given: T | None) -> T:
        """The recipe's value, else the default that depends on nothing."""
        if given is not None:
            return self.said(key, given)
        default = DEFAULTS[key]
        self.made.append(
            Choice(key=key, value=default.shown or show(default.value), origin="default", reason=default.reason)
        )
        return default.value

    def derived(self, key: str, given: T | None, value: T, reason: str, *, shown: str = "") -> T:
        """The recipe's value, else one that follows from base, machine or data. shown: instead of the value."""
        if given is not None:
            return self.said(key, given)
        self.made.append(Choice(key=key, value=shown or show(value), origin="derived", reason=reason))
        return value

    def said(self, key: str, given: T, reason: str = "") -> T:
        """A value that somebody wrote."""
        source = self._loaded.origin(key)
        origin = source.origin if source is not None else "recipe"
        where = source.where if source is not None else ""
        told = "; ".join(part for part in (where, reason) if part)
        self.made.append(Choice(key=key, value=show(given), origin=origin, reason=told))
        return given

    def unused(self, key: str, reason: str) -> None:
        """A key that does not apply to this run, and was not given."""
        self.made.append(Choice(key=key, value="-", origin="default", reason=f"does not apply: {reason}"))

    def reject(self, what: str, reason: str) -> None:
        """Something that was considered and not taken."""
        self.rejected.append(Rejection(what=what, reason=reason))


def show(value: Any) -> str:
    """A value as a recipe would write it."""
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return value if value.strip() == value and value and "\n" not in value else repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {show(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence):
        return ", ".join(show(item) for item in value)
    return str(value)
