"""A plan in rows: every value with where it came from, and the summary that is shown before anything is loaded.

Plain data; this module does not know how rows are printed.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

from tenon.bases.facts import MODULE_PATHS, parse_site
from tenon.plan.keeping import describe
from tenon.plan.values import Choice, Plan, SlotPlan
from tenon.recipe.fields import leaf_fields
from tenon.recipe.load import Loaded
from tenon.units import format_bytes, format_count, format_seconds, format_share, format_short
from tenon.values import Value


class ExplainRow(Value):
    """One value: its key, the value, where it came from (`my.yaml:3`, `default`, `derived`, …), and the reason."""

    key: str
    value: str
    origin: str
    reason: str


class PlanRow(Value):
    """One line of the summary. rough: an estimate, to be printed as one."""

    group: Literal["run", "adapter", "data", "cost"]
    what: str
    value: str
    note: str = ""
    rough: bool = False


def explain_rows(loaded: Loaded, plan: Plan) -> tuple[ExplainRow, ...]:
    """Every field of the recipe in the order of the schema, then what else was decided, then other tools' keys that
    say what Tenon does anyway.
    """
    choices = {choice.key: choice for choice in plan.choices}
    keys = [leaf.key for leaf in leaf_fields()]
    rows = [_explained(choices[key]) for key in keys]
    rows += [_explained(choice) for key, choice in choices.items() if key not in keys]
    rows += [
        ExplainRow(key=given.key, value="as always", origin="alias", reason=f"{given.where}: Tenon does this anyway")
        for given in loaded.always
    ]
    return tuple(rows)


def _explained(choice: Choice) -> ExplainRow:
    return ExplainRow(key=choice.key, value=choice.value, origin=choice.origin, reason=choice.reason)


def plan_rows(plan: Plan) -> tuple[PlanRow, ...]:
    """The summary of `tenon plan`: the run, each adapter with its data, and what it will cost."""
    return (*_run_rows(plan), *(row for slot in plan.slots for row in _slot_rows(slot, plan)), *_cost_rows(plan))


def _run_rows(plan: Plan) -> list[PlanRow]:
    facts, machine = plan.base.facts, plan.machine
    built = f"{facts.family}, {format_short(facts.parameters)} parameters, {facts.layers} layers"
    memory = f"{format_bytes(machine.device_memory_bytes)} may be used, {machine.threads} threads"
    keeping = plan.keeping
    return [
        PlanRow(group="run", what="base", value=plan.base.spec, note=built),
        PlanRow(group="run", what="device", value=_devices(plan), note=f"{machine.device_name}, {memory}"),
        PlanRow(group="run", what="precision", value=_precision(plan), note="the adapter itself is fp32"),
        PlanRow(group="run", what="tokens at once", value=format_count(keeping.micro_tokens), note=describe(keeping)),
        PlanRow(group="run", what="run folder", value=plan.run_folder),
    ]


def _devices(plan: Plan) -> str:
    count = plan.devices.count
    if count == 1:
        return plan.machine.device
    return f"{count} x {plan.machine.device}, " + (
        "the base spread over them" if plan.devices.sharded else "a replica each"
    )


def _precision(plan: Plan) -> str:
    if plan.base_format == "dense":
        return plan.precision
    return f"{plan.precision}, the base in {plan.base_format}"


def _cost_rows(plan: Plan) -> list[PlanRow]:
    estimate, keep = plan.estimate, plan.checkpoint.keep
    counted = not estimate.exact_steps
    share = f"{format_share(estimate.trainable_share)} of the base's {format_short(plan.base.facts.parameters)}"
    disk = format_bytes((keep + 2) * estimate.checkpoint_bytes)
    time = format_seconds(estimate.seconds)
    return [
        PlanRow(group="cost", what="trainable", value=format_count(estimate.trainable_parameters), note=share),
        PlanRow(group="cost", what="rows", value=format_count(estimate.train_rows), rough=counted),
        PlanRow(group="cost", what="steps", value=format_count(estimate.steps), rough=counted),
        PlanRow(group="cost", what="tokens", value=format_short(estimate.train_tokens), rough=True),
        PlanRow(
            group="cost",
            what="memory",
            value=format_bytes(estimate.memory_bytes),
            note="on each device" if plan.devices.count > 1 else "",
            rough=True,
        ),
        PlanRow(group="cost", what="time", value=time, note="without loading and the final evaluation", rough=True),
        PlanRow(
            group="cost", what="disk", value=disk, note=f"{keep} checkpoints, the best, one being written", rough=True
        ),
    ]


def _slot_rows(slot: SlotPlan, plan: Plan) -> list[PlanRow]:
    lora, optimizer, schedule, batch = slot.lora, slot.optimizer, slot.schedule, slot.batch
    size = f"{batch.rows} rows" if batch.rows else f"{format_count(batch.tokens)} tokens"
    limits = slot.limits
    ends = [
        f"{limits.epochs:g} epochs" if limits.epochs else "",
        f"{limits.steps} steps" if limits.steps else "",
        f"{limits.minutes:g} minutes" if limits.minutes else "",
    ]
    return [
        PlanRow(
            group="adapter",
            what=slot.name,
            value=f"rank {lora.rank}, scale {lora.scale:g}",
            note=coverage(slot, plan.base.facts.layers),
        ),
        PlanRow(
            group="adapter",
            what="optimiser",
            value=f"{optimizer.kind}, lr {optimizer.lr:g}",
            note=f"{schedule.kind}, warm-up {format_share(schedule.warmup)}, steps of {size}",
        ),
        PlanRow(group="adapter", what="ends after", value=" or ".join(end for end in ends if end)),
        PlanRow(
            group="data",
            what="train",
            value=", ".join(source.path for source in slot.data.train),
            note=_validation_note(slot),
        ),
    ]


def coverage(slot: SlotPlan, layers: int) -> str:
    """`210 of 210 matrices (q, k, v, o, gate, up, down in 30 of 30 layers)`: what the targets matched."""
    modules = Counter(parse_site(site)[1] for site in slot.lora.sites)
    touched = len({parse_site(site)[0] for site in slot.lora.sites})
    names = ", ".join(name.removesuffix("_proj") for name in MODULE_PATHS if name in modules)
    return f"{len(slot.lora.sites)} of {layers * len(MODULE_PATHS)} matrices ({names} in {touched} of {layers} layers)"


def _validation_note(slot: SlotPlan) -> str:
    data = slot.data
    if data.validation:
        where = ", ".join(source.path for source in data.validation)
    elif data.heldout:
        where = f"{format_share(data.heldout)} held out"
    else:
        return "no validation"
    every = slot.validation.every
    return f"validation: {where}, {f'every {every} steps' if every else 'at the end'}"
