"""Frozen values that are passed left to right: JSON-able, equal after a round trip, with a content hash.

Recipe, Plan, Result and Entry are all a `Value`. This module knows nothing of what they hold.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Self

from pydantic import BaseModel, ConfigDict


class Value(BaseModel):
    """A frozen record: no unknown field, no change after construction, one canonical JSON form."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, ser_json_inf_nan="constants")

    def to_json(self) -> str:
        """The canonical form: keys sorted, no spaces; equal values give equal text."""
        return canonical_json(self.model_dump(mode="json"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The value that `to_json` wrote. Raises pydantic.ValidationError on anything else."""
        return cls.model_validate_json(text)

    @property
    def content_hash(self) -> str:
        """SHA-256 of the canonical form, 64 hex digits."""
        return hash_text(self.to_json())


def canonical_json(tree: Any) -> str:
    """JSON with sorted keys and no spaces: the same tree always gives the same text."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def hash_text(text: str) -> str:
    """SHA-256 of UTF-8 text, 64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()
