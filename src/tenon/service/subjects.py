"""From what a user types to who answers: `base`, a registered adapter, a run, a PEFT folder; and the base that it needs.

This module does not know how a subject answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tenon.bases.locate import EMBEDDED
from tenon.errors import AdapterError, RunError, UsageError
from tenon.plan.machine import read_machine
from tenon.plan.requests import Engine, Subject
from tenon.plan.values import BasePlan, DataPlan, Plan, Precision, SlotPlan, SourcePlan
from tenon.registry.store import Registry
from tenon.runs.folder import RunFolder
from tenon.runs.naming import find_run
from tenon.service.plans import describe_base
from tenon.service.runs import RUNS_ROOT, read_plan
from tenon.settings import Settings

BASE = "base"
# Rows that nobody planned for: the longest that are judged, and what becomes of others.
_MAX_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows to judge: one side of a plan's data."""

    data: DataPlan
    side: Literal["train", "validation"] = "train"


@dataclass(frozen=True, slots=True)
class Opened:
    """A subject with all that it needs. data: how its rows are rendered; rows: those it was evaluated on, if known."""

    engine: Engine
    subject: Subject
    data: DataPlan
    rows: Rows | None = None

    @property
    def system(self) -> str:
        """The system message that it was trained with."""
        return self.data.system or ""


def open_subject(name: str | None, base: str | None, settings: Settings) -> Opened:
    """Who answers; no name is the bare base. base: overrides the subject's own.

    Raises AdapterError, RunError, BaseModelError.
    """
    if name is None or name == BASE:
        return _open_base(base or EMBEDDED[0].names[0], settings)
    found = _find(name, settings)
    if base is not None:
        other = describe_base(base, settings)
        _require_base(found.subject.label, found.engine.base.base_hash, other)
    return found


def open_subjects(names: Sequence[str], base: str | None, settings: Settings) -> tuple[Opened, ...]:
    """Several subjects over one base: `base` is the bare base of the others. Raises UsageError usage-two-bases."""
    others = [open_subject(name, base, settings) for name in names if name != BASE]
    bare = base or (others[0].engine.base.path if others else None)
    opened = iter(others)
    found = [open_subject(BASE, bare, settings) if name == BASE else next(opened) for name in names]
    hashes = {each.engine.base.base_hash for each in found}
    if len(hashes) > 1:
        raise UsageError(
            "usage-two-bases",
            f"{' and '.join(each.subject.label for each in found)} stand on different bases",
            got=", ".join(sorted(hash_[:12] for hash_ in hashes)),
            hint="judge each by itself with --out, then: tenon compare A.json B.json",
        )
    return tuple(found)


def rows_of(data: DataPlan, sources: tuple[SourcePlan, ...]) -> Rows:
    """All rows of the sources, every one once, rendered as `data` says."""
    every = {"train": sources, "validation": (), "heldout": 0.0, "on_duplicate": "keep", "shuffle": False}
    return Rows(data.model_copy(update=every))
