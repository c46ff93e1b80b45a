"""Typed look-ups in one config.json: what is missing, of the wrong type, or unknown is refused by name.

This module does not know what the keys mean.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tenon.errors import BaseModelError


class ConfigReader:
    """One JSON object of a base's folder. where: how messages name it."""

    def __init__(self, tree: dict[str, Any], where: str) -> None:
        self.tree, self.where = tree, where

    @classmethod
    def open(cls, path: Path) -> ConfigReader:
        """Read a file that holds one JSON object. Raises BaseModelError base-config."""
        try:
            tree = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise BaseModelError(
                "base-config", f"{path} is no JSON", got=str(error)[:100], hint="download the file again"
            ) from error
        if not isinstance(tree, dict):
            raise BaseModelError(
                "base-config", f"{path} holds no JSON object", got=type(tree).__name__, hint="download the file again"
            )
        return cls(tree, str(path))

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number above zero; null and a missing key mean the default; without one they are refused."""
        value = self.tree.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(key, "a whole number above 0")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number; null and a missing key mean the default; without one they are refused."""
        value = self.tree.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(key, "a number")
        return float(value)

    def number_or_none(self, key: str) -> float | None:
        """A number, or None where the key is missing or null."""
        return None if self.tree.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool) -> bool:
        """true or false; null and a missing key mean the default."""
        value = self.tree.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def wrong(self, key: str, wanted: str) -> BaseModelError:
        """The error for a key whose value is missing or of another type."""
        got = repr(self.tree[key])[:80] if key in self.tree else "nothing"
        return BaseModelError(
            "base-config", f"{self.where}: {key} must be {wanted}", got=got, hint="correct it, or download it again"
        )

    def unsupported(self, key: str, why: str) -> BaseModelError:
        """The error for a value that is valid elsewhere, but asks for something that Tenon's decoder does not do."""
        return BaseModelError(
            "base-unsupported",
            f"{self.where}: {key}: {why}",
            got=repr(self.tree.get(key))[:80],
            hint="choose another base; running this one without it would give wrong results",
        )
