"""The planned base, found again as files. Separate from the engine so that a look at the data needs no torch."""

from __future__ import annotations

from pathlib import Path

from tenon.bases.identity import hash_base
from tenon.bases.locate import locate_base
from tenon.errors import BaseModelError
from tenon.models.prepare import prepare_base
from tenon.plan.values import BasePlan
from tenon.settings import Settings


def find_base(base: BasePlan, settings: Settings) -> Path:
    """The prepared folder of the planned base. Raises BaseModelError base-changed when its contents are others now."""
    location = locate_base(base.path, settings)
    found = hash_base(location, settings)
    if found != base.base_hash:
        raise BaseModelError(
            "base-changed",
            f"the base at {base.path} is not the one that was planned with ({base.base_hash[:12]})",
            got=found[:12],
            hint="put the planned base back, or plan and train anew",
        )
    return prepare_base(location, settings)
