"""Several plans over one base become one run with several slots; what they cannot share is refused.

Pure arithmetic. This module does not know recipes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tenon.errors import PlanError
from tenon.plan.devices import rank_machine
from tenon.plan.fit import Tried, check_disk, load_of, search, usable_bytes
from tenon.plan.values import LEVELS, CheckpointPlan, Choice, DevicesPlan, Estimate, Frozen, Level, Plan
from tenon.units import format_bytes


def combine(plans: Sequence[Plan]) -> Plan:
    """One plan with the slots of all, in order.

    Raises PlanError: plan-combine (another base, device or precision, or the same name twice), plan-memory, plan-disk.
    """
    first = plans[0]
    if len(plans) == 1:
        return first
    for other in plans[1:]:
        _check_shared(first, other)
    slots = tuple(slot for plan in plans for slot in plan.slots)
    repeated = [name for name, count in Counter(slot.name for slot in slots).items() if count > 1]
    if repeated:
        raise PlanError(
            "plan-combine",
            f"two recipes are named {repeated[0]}: adapters of one run need names of their own",
            hint="set name in one of the recipes",
        )
    checkpoint = CheckpointPlan(
        every=min((plan.checkpoint.every for plan in plans if plan.checkpoint.every), default=0),
        keep=max(plan.checkpoint.keep for plan in plans),
    )
    combined = first.model_copy(
        update={
            "may_keep": _may_keep(plans),
            "memory_limit_bytes": _limit(plans),
            "fp8_twice": _frozen(plans).fp8_twice,
            "devices": _devices(plans),
            "share_prefix": all(plan.share_prefix for plan in plans),
            "slots": slots,
            "checkpoint": checkpoint,
            "run_folder": _run_folder(plans),
            "trackers": tuple(dict.fromkeys(name for plan in plans for name in plan.trackers)),
            "choices": tuple(_own(choice, plan) for plan in plans for choice in plan.choices),
            "rejected": tuple(dict.fromkeys(rejection for plan in plans for rejection in plan.rejected)),
        }
    )
    fit = _fit(combined, plans)
    estimate = _estimate(plans, memory_bytes=fit.total_bytes)
    need_bytes = (checkpoint.keep + 2) * estimate.checkpoint_bytes
    check_disk(first.machine, need_bytes, keep=checkpoint.keep, folder=combined.run_folder)
    return combined.model_copy(update={"keeping": fit.chosen.keeping, "estimate": estimate})


def _run_folder(plans: Sequence[Plan]) -> str:
    """The folder that all recipes ask for, or else one named after all of them."""
    asked = {plan.run_folder for plan in plans}
    if len(asked) == 1:
        return asked.pop()
    names = "+".join(slot.name for plan in plans for slot in plan.slots)
    return str(Path(plans[0].run_folder).parent / names[:120])


def _check_shared(first: Plan, other: Plan) -> None:
    names = f"{first.slots[0].name} and {other.slots[0].name}"
    for what, a, b in (
        ("base", first.base.base_hash, other.base.base_hash),
        ("device", first.machine.device, other.machine.device),
        ("precision", first.precision, other.precision),
        ("precision.base", _base_words(first), _base_words(other)),
        *([] if set(first.may_keep) & set(other.may_keep) else [("checkpointing", "none", "full")]),
    ):
        if a != b:
            raise PlanError(
                "plan-combine",
                f"{names} cannot train together: their {what} differs",
                got=f"{a} and {b}",
                hint=f"give both the same {what}, or train them one after the other",
            )


def _base_words(plan: Plan) -> str:
    return plan.base_format + (" in fp8 products" if plan.fp8_compute else "")


def _frozen(plans: Sequence[Plan]) -> Frozen:
    """What all share; an fp8 base is kept twice only where every plan has room for it."""
    return plans[0].frozen.model_copy(update={"fp8_twice": all(plan.fp8_twice for plan in plans)})


def _devices(plans: Sequence[Plan]) -> DevicesPlan:
    """The most that any of them can use; steps of all together are larger than each one's."""
    return DevicesPlan(
        count=max(plan.devices.count for plan in plans), sharded=any(plan.devices.sharded for plan in plans)
    )


def _may_keep(plans: Sequence[Plan]) -> tuple[Level, ...]:
    """What every recipe leaves open."""
    return tuple(level for level in LEVELS if all(level in plan.may_keep for plan in plans))


def _limit(plans: Sequence[Plan]) -> int | None:
    return min((plan.memory_limit_bytes for plan in plans if plan.memory_limit_bytes), default=None)


def _fit(combined: Plan, plans: Sequence[Plan]) -> Tried:
    """How all of them fit together, every slot's rows in one stream. Raises PlanError plan-memory."""
    longest = max(slot.data.max_tokens for slot in combined.slots)
    asked = [plan.keeping.micro_tokens for plan in plans if _is_asked(plan, "batch.micro_tokens")]
    step_tokens = sum(plan.estimate.train_tokens / plan.estimate.steps for plan in plans)
    load = replace(
        load_of(combined, longest_tokens=longest, step_tokens=step_tokens),
        machine=rank_machine(combined.machine, combined.devices.count),
        micro_tokens=max(longest, min(asked)) if asked else None,
    )
    best, too_large = search(load)
    if best is not None:
        return best
    need_bytes = min(tried.total_bytes for tried in too_large)
    raise PlanError(
        "plan-memory",
        f"{len(plans)} adapters together need about {format_bytes(need_bytes)} and "
        f"{format_bytes(usable_bytes(load.machine, load.limit_bytes))} may be used",
        hint="train fewer of them at once",
    )


def _is_asked(plan: Plan, key: str) -> bool:
    return any(choice.key == key and choice.origin not in ("default", "derived") for choice in plan.choices)


def _estimate(plans: Sequence[Plan], *, memory_bytes: int) -> Estimate:
    """The base counts once, adapters add up, and every slot's tokens go through the base."""
    first, estimates = plans[0], [plan.estimate for plan in plans]
    trainable = sum(estimate.trainable_parameters for estimate in estimates)
    return Estimate(
        trainable_parameters=trainable,
        trainable_share=trainable / first.base.facts.parameters,
        train_rows=sum(estimate.train_rows for estimate in estimates),
        train_tokens=sum(estimate.train_tokens for estimate in estimates),
        steps=max(estimate.steps for estimate in estimates),
        exact_steps=all(estimate.exact_steps for estimate in estimates),
        memory_bytes=memory_bytes,
        seconds=sum(estimate.seconds for estimate in estimates),
        checkpoint_bytes=sum(estimate.checkpoint_bytes for estimate in estimates),
    )


def _own(choice: Choice, plan: Plan) -> Choice:
    """The choice under its slot's name: `router:lora.rank`."""
    return choice.model_copy(update={"key": f"{plan.slots[0].name}:{choice.key}"})
