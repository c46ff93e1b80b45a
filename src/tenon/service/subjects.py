"""From what a user types to who answers: `base`, a registered adapter, a run, a PEFT folder; and the base it stands on.

This module does not know how a subject answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from tenon.bases.locate import EMBEDDED
from tenon.errors import AdapterError, RunError, UsageError
from tenon.plan.machine import read_machine
from tenon.plan.precision import resident_format
from tenon.plan.requests import Engine, Subject
from tenon.plan.values import BasePlan, DataPlan, Precision, SlotPlan, SourcePlan
from tenon.registry.entry import Entry, check_base
from tenon.registry.entry_files import ENTRY_NAME, TEMPLATE_NAME
from tenon.registry.peft_check import CONFIG_NAME, TENSORS_NAME
from tenon.registry.store import Registry
from tenon.runs.checkpoints import hash_file
from tenon.runs.folder import RunFolder
from tenon.runs.naming import find_run
from tenon.service.bases import describe_base
from tenon.service.run_list import RUNS_ROOT
from tenon.service.runs import read_plan
from tenon.settings import Settings
from tenon.values import canonical_json, hash_text

BASE = "base"


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


def open_subject(name: str | None, base: str | None, settings: Settings) -> Opened:
    """Who answers; no name is the bare base. base: stands in for the subject's own, and must hold the same.

    Raises AdapterError adapter-unknown, adapter-other-base, adapter-no-base; RunError; BaseModelError.
    """
    if name is None or name == BASE:
        bare = describe_base(base or EMBEDDED[0].names[0], settings)
        return Opened(_engine(bare, settings), Subject(label=BASE), _plain_data(bare))
    if (Path(name).expanduser() / CONFIG_NAME).is_file():
        return _open_folder(Path(name).expanduser(), base, settings)
    if not (Path(name).expanduser() / "plan.json").is_file() and name.partition("@")[0] in _names(settings):
        registry = Registry(settings.registry)
        entry = registry.get(name)
        return _open_entry(entry, registry.folder(entry), base, settings)
    return _open_run(name, base, settings)


def open_subjects(names: Sequence[str], base: str | None, settings: Settings) -> tuple[Opened, ...]:
    """Several subjects over one base: `base` is the bare base of the others. Raises UsageError usage-two-bases."""
    others = [open_subject(name, base, settings) for name in names if name != BASE]
    # The bare base is that of the others; its rows are rendered as theirs are.
    bare = (
        Opened(others[0].engine, Subject(label=BASE), others[0].data) if others else open_subject(None, base, settings)
    )
    opened = iter(others)
    found = tuple(bare if name == BASE else next(opened) for name in names)
    hashes = {each.engine.base.base_hash for each in found}
    if len(hashes) > 1:
        raise UsageError(
            "usage-two-bases",
            f"{' and '.join(each.subject.label for each in found)} stand on different bases",
            got=", ".join(sorted(hash_[:12] for hash_ in hashes)),
            hint="judge each by itself with --out FILE.json, then: tenon compare A.json B.json",
        )
    return found


def find_adapter(name: str, base: BasePlan, settings: Settings) -> Subject:
    """An adapter to switch to on a resident base. Raises as `open_subject`, adapter-other-base among them."""
    opened = open_subject(name, None, settings)
    _require_base(opened.subject.label, opened.engine.base, base)
    return opened.subject


def adapters_for(base: BasePlan, settings: Settings) -> Iterator[tuple[str, str]]:
    """(label, note) of the newest version of every registered adapter that stands on this base."""
    registry = Registry(settings.registry)
    for name in registry.names():
        entry = registry.get(name)
        if entry.base_hash == base.base_hash:
            yield entry.label, ", ".join(f"{metric.name} {metric.value:.4g}" for metric in entry.metrics[:2])


def rows_of(data: DataPlan, sources: tuple[SourcePlan, ...]) -> Rows:
    """All rows of the sources, every one once, rendered as `data` says."""
    every = {"train": sources, "validation": (), "heldout": 0.0, "on_duplicate": "keep", "shuffle": False}
    return Rows(data.model_copy(update=every))


def _open_entry(entry: Entry, folder: Path, base: str | None, settings: Settings) -> Opened:
    found = describe_base(base or entry.base_spec, settings)
    check_base(entry, found.base_hash)
    subject = Subject(
        label=entry.label,
        folder=str(folder),
        adapter_hash=entry.adapter_hash,
        template_hash=entry.template_hash or "",
        template=str(folder / TEMPLATE_NAME) if TEMPLATE_NAME in entry.beside else None,
        system=entry.system,
        stop_tokens=entry.generation.stop_tokens,
    )
    return _opened(found, subject, _slot_of(entry), settings)


def _slot_of(entry: Entry) -> SlotPlan | None:
    """The plan that an entry was trained by, when its run is still where commands look for runs."""
    if entry.run is None:
        return None
    try:
        plan = read_plan(find_run(entry.run, RUNS_ROOT))
    except RunError:
        return None
    return next((slot for slot in plan.slots if slot.recipe_hash == entry.recipe_hash), None)


def _open_run(name: str, base: str | None, settings: Settings) -> Opened:
    """A run, `RUN` or `RUN:SLOT`; where there is neither run nor adapter the message is about adapters."""
    spec, _, slot_name = name.partition(":")
    try:
        run = find_run(spec, RUNS_ROOT)
    except RunError as error:
        if error.code == "run-unknown" and spec != "latest":
            Registry(settings.registry).get(name)
        raise
    return _open_slot(run, slot_name, base, settings)


def _open_slot(run: RunFolder, slot_name: str, base: str | None, settings: Settings) -> Opened:
    """The adapter of a run; no slot name means its only one."""
    plan = read_plan(run)
    slots = [slot for slot in plan.slots if slot_name in ("", slot.name)]
    if len(slots) != 1:
        raise RunError(
            "run-which-slot",
            f"{run.path}: the run has {len(plan.slots)} adapters" + (f", none named {slot_name}" if slot_name else ""),
            got=", ".join(slot.name for slot in plan.slots),
            hint=f"name one: {run.path}:{plan.slots[0].name}",
        )
    slot, folder = slots[0], _finished_adapter(run, slots[0])
    found = describe_base(base or plan.base.path, settings)
    _require_base(slot.name, plan.base, found)
    subject = Subject(label=slot.name, folder=str(folder), adapter_hash=_hash(folder), system=slot.data.system)
    return _opened(found, subject, slot, settings)


def _finished_adapter(run: RunFolder, slot: SlotPlan) -> Path:
    folder = run.adapter_folder(slot.name)
    if not (folder / CONFIG_NAME).is_file():
        raise RunError(
            "run-unfinished",
            f"{run.path}: the run has no finished adapter {slot.name} yet",
            hint=f"go on with it: tenon resume {run.path}",
        )
    return folder


def _open_folder(folder: Path, base: str | None, settings: Settings) -> Opened:
    """A folder in PEFT's layout: one that a run or the registry wrote is known by what lies beside it.

    Of an adapter made elsewhere its own config names the base, unless the command line does.
    """
    folder = folder.absolute()
    if (folder / ENTRY_NAME).is_file():
        return _open_entry(_read_entry(folder), folder, base, settings)
    run = folder.parent.parent
    if folder.parent.name == "adapter" and (run / "plan.json").is_file():
        return _open_slot(RunFolder.open(run), folder.name, base, settings)
    spec = base or _named_base(folder)
    if not spec:
        raise AdapterError(
            "adapter-no-base", f"{folder}: the adapter does not say which base it needs", hint="name it: --base SPEC"
        )
    found = describe_base(spec, settings)
    subject = Subject(label=folder.name, folder=str(folder), adapter_hash=_hash(folder))
    return _opened(found, subject, None, settings)


def _read_entry(folder: Path) -> Entry:
    try:
        return Entry.from_json((folder / ENTRY_NAME).read_bytes())
    except ValidationError as error:
        raise AdapterError(
            "adapter-damaged",
            f"{folder / ENTRY_NAME}: this is no entry of this version of Tenon",
            hint="export the adapter again: tenon adapters export NAME FOLDER",
        ) from error


def _named_base(folder: Path) -> str:
    try:
        config = json.loads((folder / CONFIG_NAME).read_bytes())
    except ValueError as error:
        raise AdapterError(
            "adapter-config", f"{folder / CONFIG_NAME}: the file is no JSON", hint="export the adapter again"
        ) from error
    spec = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    return spec if isinstance(spec, str) else ""


def _opened(base: BasePlan, subject: Subject, slot: SlotPlan | None, settings: Settings) -> Opened:
    if slot is None:
        data = _plain_data(base, subject.system).model_copy(update={"template": subject.template})
        return Opened(_engine(base, settings), subject, data)
    return Opened(_engine(base, settings, slot.data.template), subject, slot.data, _judged_rows(slot))


def _judged_rows(slot: SlotPlan) -> Rows | None:
    if slot.evaluation.sources:
        return rows_of(slot.data, slot.evaluation.sources)
    has_validation = bool(slot.data.validation or slot.data.heldout)
    return Rows(slot.data, "validation") if has_validation else None


def _engine(base: BasePlan, settings: Settings, template: str | None = None) -> Engine:
    machine = read_machine(settings, run_folder=Path.cwd())
    precision: Precision = "fp32" if machine.device == "cpu" else "bf16" if machine.bf16 else "fp16"
    frozen = resident_format(base.facts, machine, precision)
    return Engine(base=base, machine=machine, precision=precision, frozen=frozen, template=template)


def _plain_data(base: BasePlan, system: str | None = None) -> DataPlan:
    """How rows are rendered when no recipe says it."""
    return DataPlan(
        train=(),
        max_tokens=base.facts.context_tokens,
        on_long="stop",
        on_bad="stop",
        on_duplicate="keep",
        supervise="assistant",
        system=system,
        shuffle=False,
    )


def _require_base(label: str, own: BasePlan, found: BasePlan) -> None:
    if own.base_hash != found.base_hash:
        raise AdapterError(
            "adapter-other-base",
            f"{label} belongs to the base {own.spec} ({own.base_hash[:12]}), not to {found.spec}",
            got=found.base_hash[:12],
            hint=f"use its own base: --base {own.spec}",
        )


def _names(settings: Settings) -> tuple[str, ...]:
    return Registry(settings.registry).names()


def _hash(folder: Path) -> str:
    """One hash of an adapter's files, the same as its entry has."""
    files = {name: hash_file(folder / name) for name in (CONFIG_NAME, TENSORS_NAME) if (folder / name).is_file()}
    return hash_text(canonical_json(files))
