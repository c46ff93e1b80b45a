"""Bases as commands need them: found, read, hashed. This module does not know what they are wanted for."""

from __future__ import annotations

from tenon.bases.identity import hash_base
from tenon.bases.locate import locate_base
from tenon.bases.read import read_facts
from tenon.plan.values import BasePlan
from tenon.settings import Settings


def describe_base(spec: str, settings: Settings) -> BasePlan:
    """Find a base, read what it is, and hash its contents. Raises BaseModelError."""
    location = locate_base(spec, settings)
    return BasePlan(
        spec=location.spec,
        path=str(location.path),
        base_hash=hash_base(location, settings),
        facts=read_facts(location),
    )
