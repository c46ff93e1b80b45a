"""The end of a slot's run: its adapter is written, judged against the base, and registered.

Every part may be done again after a kill: files are replaced by equal ones, and an adapter is registered once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tenon.adapters.peft_files import write_adapter
from tenon.pipeline.engine import Workbench
from tenon.pipeline.judging import judge_against_base
from tenon.pipeline.probing import record_probes
from tenon.pipeline.slot_data import Emit, SlotData
from tenon.plan.values import Plan
from tenon.registry.entry import Entry, EntryDraft
from tenon.registry.entry_files import ENTRY_NAME, TEMPLATE_NAME
from tenon.registry.probes import PROBES_NAME
from tenon.registry.store import Registry
from tenon.runs.atomic import write_folder_atomic
from tenon.runs.checkpoints import hash_file
from tenon.runs.folder import RunFolder
from tenon.runs.results import Metric
from tenon.settings import Settings
from tenon.train.slot import SlotTraining


def finish_slot(
    run: RunFolder,
    plan: Plan,
    training: SlotTraining,
    data: SlotData,
    bench: Workbench,
    settings: Settings,
    emit: Emit,
) -> None:
    """Write, judge and register one slot's adapter."""
    slot = training.plan
    folder = run.adapter_folder(slot.name)

    def write(aside: Path) -> None:
        write_adapter(aside, training.slot, base=plan.base.spec, rslora=slot.lora.rslora)

    write_folder_atomic(folder, write, replace=True)
    metrics: tuple[Metric, ...] = ()
    if data.evaluation is not None:
        emit("phase", name="evaluate", detail=slot.name)
        metrics = judge_against_base(run, plan, training, data, bench, emit)
    if slot.register_as is None:
        return
    draft = EntryDraft(
        base_spec=plan.base.spec,
        base_hash=plan.base.base_hash,
        run=run.name,
        data_hash=data.dataset.content_hash,
        template_hash=data.dataset.renderer.template_hash,
        recipe_hash=slot.recipe_hash,
        metrics=metrics,
        parent=_parent(slot.lora.start_from),
        system=slot.data.system,
        base_format=plan.base_format,
        generation=slot.serving.generation,
    )
    beside = _beside(plan, training, data, bench)
    entry = _register_once(Registry(settings.registry), slot.register_as, folder, draft, beside)
    emit("registered", slot=slot.name, name=entry.name, version=entry.version)


def _beside(plan: Plan, training: SlotTraining, data: SlotData, bench: Workbench) -> dict[str, bytes]:
    """The files that are kept beside the adapter's."""
    rows = data.dataset.validation if len(data.dataset.validation) else data.dataset.train
    template = data.dataset.renderer.given_template
    files = {} if template is None else {TEMPLATE_NAME: template.encode()}
    count = training.plan.serving.probes
    if count:
        probes = record_probes(bench, training.number, rows, count=count, plan=plan)
        files[PROBES_NAME] = probes.to_json().encode()
    return files


def _parent(start: str | None) -> str | None:
    """NAME@VERSION of a registered adapter, the folder of another."""
    if start is None or not (Path(start) / ENTRY_NAME).is_file():
        return start
    return f"{Path(start).parent.name}@{Path(start).name}"


def _register_once(
    registry: Registry, name: str, folder: Path, draft: EntryDraft, beside: Mapping[str, bytes]
) -> Entry:
    """The version that this very run has registered already, or a new one."""
    for version in reversed(registry.versions(name)):
        entry = registry.get(f"{name}@{version}")
        if entry.run == draft.run and _same_files(entry, folder):
            return entry
    return registry.register(name, folder, draft, beside=beside)


def _same_files(entry: Entry, folder: Path) -> bool:
    return all(
        (folder / file).is_file() and hash_file(folder / file) == facts.sha256 for file, facts in entry.files.items()
    )
