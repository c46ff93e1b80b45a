"""Recipe + base + machine + data size -> Plan: every choice with its reason, or why it cannot run here.

Pure arithmetic: the same arguments give the same plan. This module knows no tensors and reads no files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tenon.bases.facts import ModelFacts
from tenon.errors import PlanError
from tenon.plan.choices import Choices
from tenon.plan.devices import StepFacts, candidate_counts, decide_devices, rank_machine, step_seconds
from tenon.plan.fit import Fit, Load, check_disk, find_fit, usable_bytes
from tenon.plan.keeping import computed_twice, describe, may_keep
from tenon.plan.memory import adapter_parameters, checkpoint_bytes, gradient_bytes, trained_layers
from tenon.plan.precision import base_formats, decide_compute, explain_base
from tenon.plan.size import DataSize, count_steps, rows_per_step
from tenon.plan.slots import (
    decide_batch,
    decide_data,
    decide_evaluation,
    decide_limits,
    decide_lora,
    decide_optimizer,
    decide_schedule,
    decide_serving,
    decide_validation,
    heldout_rows,
    register_name,
    slot_name,
    train_rows,
)
from tenon.plan.time import flops_per_token
from tenon.plan.values import (
    BasePlan,
    BatchPlan,
    CheckpointPlan,
    DataPlan,
    DevicesPlan,
    Estimate,
    Frozen,
    LimitsPlan,
    LoraPlan,
    MachineFacts,
    OptimizerPlan,
    Plan,
    Precision,
    SlotPlan,
)
from tenon.recipe.load import Loaded
from tenon.units import format_bytes, format_share, format_tokens, parse_bytes

CHECKPOINT_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Parts:
    """What is learned, from what, in which portions."""

    lora: LoraPlan
    optimizer: OptimizerPlan
    data: DataPlan
    batch: BatchPlan
    limits: LimitsPlan


@dataclass(frozen=True, slots=True)
class Work:
    """What the parts amount to on this machine. exact: steps is no estimate."""

    fit: Fit
    devices: DevicesPlan
    rows: int
    validation_rows: int
    step_tokens: float
    step_seconds: float
    steps: int
    exact: bool


def decide(loaded: Loaded, *, base: BasePlan, machine: MachineFacts, data_size: DataSize) -> Plan:
    """Answer everything that the recipe leaves open.

    machine: with its GPU where it has one, whatever the recipe asks for. Raises PlanError plan-….
    """
    choices, recipe = Choices(loaded), loaded.recipe
    choices.said("base", recipe.base)
    name = slot_name(loaded, choices)
    seed = choices.default("seed", recipe.seed)
    machine = _device(loaded, choices, machine)
    precision = decide_compute(loaded, choices, machine)
    formats = base_formats(loaded, choices, base.facts, machine=machine, precision=precision)
    parts = Parts(
        lora=decide_lora(loaded, choices, base.facts),
        optimizer=decide_optimizer(loaded, choices, base.facts, machine),
        data=decide_data(loaded, choices, base.facts, machine=machine, size=data_size, seed=seed),
        batch=decide_batch(loaded, choices),
        limits=decide_limits(loaded, choices),
    )
    work = _work(
        loaded, choices, parts, base.facts, machine=machine, precision=precision, formats=formats, size=data_size
    )
    machine = rank_machine(machine, work.devices.count) if machine.device == "cuda" else machine
    frozen = work.fit.best.frozen
    explain_base(loaded, choices, frozen, facts=base.facts, machine=machine)
    _explain_fit(loaded, choices, work.fit, machine)
    slot = _slot(loaded, choices, parts, work, name=name, seed=seed)
    checkpoint = _checkpoint(loaded, choices, work)
    run_folder = _run_folder(loaded, choices, name)
    estimate = _estimate(choices, base.facts, slot, work)
    check_disk(machine, (checkpoint.keep + 2) * estimate.checkpoint_bytes, keep=checkpoint.keep, folder=run_folder)
    return Plan(
        base=base,
        machine=machine,
        precision=precision,
        base_format=frozen.format,
        fp8_compute=frozen.fp8_compute,
        fp8_twice=frozen.fp8_twice,
        devices=work.devices,
        keeping=work.fit.keeping,
        may_keep=may_keep(recipe.checkpointing or "auto", machine.device),
        memory_limit_bytes=_memory_limit(loaded),
        share_prefix=_share_prefix(choices, parts.lora.dropout),
        slots=(slot,),
        checkpoint=checkpoint,
        run_folder=run_folder,
        trackers=choices.default("trackers", recipe.trackers),
        estimate=estimate,
        choices=tuple(choices.made),
        rejected=tuple(choices.rejected),
    )


def _work(
    loaded: Loaded,
    choices: Choices,
    parts: Parts,
    facts: ModelFacts,
    *,
    machine: MachineFacts,
    precision: Precision,
    formats: tuple[Frozen, ...],
    size: DataSize,
) -> Work:
    data, batch = parts.data, parts.batch
    rows = train_rows(data, size)
    row_tokens = min(size.mean_tokens, data.max_tokens)
    step_rows = rows_per_step(batch, row_tokens)
    step_tokens = step_rows * row_tokens
    counts = candidate_counts(loaded, machine)
    token_flops = flops_per_token(
        facts,
        lora_parameters=adapter_parameters(facts, parts.lora),
        row_tokens=row_tokens,
        supervised_share=size.supervised_share,
        trained_share=trained_layers(facts, parts.lora) / facts.layers,
    )
    fit = find_fit(
        Load(
            facts=facts,
            slots=((parts.lora, parts.optimizer),),
            machine=rank_machine(machine, counts[-1]),
            precision=precision,
            longest_tokens=min(size.longest_tokens or data.max_tokens, data.max_tokens),
            step_tokens=step_tokens / counts[0],
            row_tokens=row_tokens,
            token_flops=token_flops,
            micro_tokens=loaded.recipe.batch.micro_tokens,
            levels=may_keep(loaded.recipe.checkpointing or "auto", machine.device),
            formats=formats,
            shards=tuple(sorted({1, *counts})),
            limit_bytes=_memory_limit(loaded),
        )
    )
    step = StepFacts(
        rows=step_rows,
        tokens=step_tokens,
        token_flops=token_flops + computed_twice(facts, row_tokens, fit.keeping),
        gradient_bytes=gradient_bytes(facts, parts.lora),
        batch_tokens=min(fit.keeping.micro_tokens, step_tokens),
    )

    def seconds_on(devices: DevicesPlan) -> float:
        return step_seconds(devices, step, facts, machine, precision=precision, frozen=fit.best.frozen)

    devices = decide_devices(
        loaded, choices, machine, counts=counts, shards=fit.best.shards, step_rows=step_rows, seconds=seconds_on
    )
    seconds = seconds_on(devices)
    return Work(
        fit=fit,
        devices=devices,
        rows=rows,
        validation_rows=size.validation_rows if data.validation else heldout_rows(data, size),
        step_tokens=step_tokens,
        step_seconds=seconds,
        steps=count_steps(rows, row_tokens, batch, parts.limits, seconds),
        exact=size.exact and bool(batch.rows) and not parts.limits.minutes,
    )


def _slot(loaded: Loaded, choices: Choices, parts: Parts, work: Work, *, name: str, seed: int) -> SlotPlan:
    validation = decide_validation(loaded, choices, rows=work.validation_rows, steps=work.steps)
    register_as = register_name(loaded, choices, name)
    return SlotPlan(
        name=name,
        recipe_hash=loaded.recipe.content_hash,
        seed=seed,
        lora=parts.lora,
        optimizer=parts.optimizer,
        schedule=decide_schedule(loaded, choices, steps=work.steps, exact=work.exact),
        data=parts.data,
        batch=parts.batch,
        limits=parts.limits,
        validation=validation,
        evaluation=decide_evaluation(
            loaded, choices, validation_rows=work.validation_rows, max_new_tokens=validation.max_new_tokens
        ),
        register_as=register_as,
        serving=decide_serving(loaded, choices, registered=register_as is not None),
    )


def _estimate(choices: Choices, facts: ModelFacts, slot: SlotPlan, work: Work) -> Estimate:
    trainable = adapter_parameters(facts, slot.lora)
    share = trainable / facts.parameters
    coverage = f"{trainable:,} trainable parameters, {format_share(share)} of the base"
    choices.derived("lora.sites", None, f"{len(slot.lora.sites)} matrices", coverage)
    return Estimate(
        trainable_parameters=trainable,
        trainable_share=share,
        train_rows=work.rows,
        train_tokens=round(work.steps * work.step_tokens),
        steps=work.steps,
        exact_steps=work.exact,
        memory_bytes=work.fit.best.total_bytes,
        seconds=work.steps * work.step_seconds + _validation_seconds(slot, work),
        checkpoint_bytes=checkpoint_bytes(facts, slot.lora, slot.optimizer),
    )


def _device(loaded: Loaded, choices: Choices, machine: MachineFacts) -> MachineFacts:
    """The machine as this run uses it."""
    asked = loaded.recipe.device if loaded.recipe.device != "auto" else None
    if asked == "cuda" and machine.device != "cuda":
        raise PlanError(
            "plan-no-gpu",
            "device is cuda, and this machine (or this installation of torch) has no GPU that can be used",
            got=machine.device_name,
            hint="set device: cpu, or install a torch with CUDA",
        )
    reason = f"{machine.device_name}, {format_bytes(machine.device_memory_bytes)} may be used"
    if choices.derived("device", asked, machine.device, reason) == machine.device:
        return machine
    choices.reject(machine.device_name, "the recipe says device: cpu")
    return machine.model_copy(
        update={
            "device": "cpu",
            "device_name": "CPU",
            "device_count": 1,
            "device_memory_bytes": machine.host_memory_bytes,
            "bf16": False,
            "capability": None,
        }
    )


def _memory_limit(loaded: Loaded) -> int | None:
    """What the recipe allows the run; None for all that is free."""
    asked = loaded.recipe.memory
    return None if asked is None or asked == "auto" else parse_bytes(asked)


def _explain_fit(loaded: Loaded, choices: Choices, fit: Fit, machine: MachineFacts) -> None:
    """Record what was chosen, and what was too large for it."""
    recipe, keeping, best = loaded.recipe, fit.keeping, fit.best
    limit_bytes = _memory_limit(loaded)
    usable = usable_bytes(machine, limit_bytes)
    used = f"about {format_bytes(best.total_bytes)} of it; {describe(keeping)}"
    if limit_bytes is None:
        choices.derived("memory", None, format_bytes(usable), used)
    else:
        choices.said("memory", recipe.memory, used)
    choices.derived(
        "batch.micro_tokens", recipe.batch.micro_tokens, keeping.micro_tokens, "the fastest of what fits in memory"
    )
    asked = recipe.checkpointing if recipe.checkpointing != "auto" else None
    inner = keeping.input_layers + keeping.host_layers
    whole = "none" if not inner + keeping.most_layers else "full" if inner == sum(keeping.counts) else "some layers"
    reason = "all fits, and nothing is computed twice" if whole == "none" else describe(keeping)
    choices.derived("checkpointing", asked, whole, reason)
    _reject_larger(choices, fit)


def _reject_larger(choices: Choices, fit: Fit) -> None:
    best, too_large = fit.best, fit.too_large
    for frozen in dict.fromkeys(tried.frozen for tried in too_large if tried.frozen != best.frozen):
        need_bytes = min(tried.total_bytes for tried in too_large if tried.frozen == frozen)
        kept = "unquantised" if frozen.format == "dense" else f"in {frozen.format}{', twice' * frozen.fp8_twice}"
        choices.reject(f"a base {kept}", f"needs about {format_bytes(need_bytes)}")
    for tried in (tried for tried in too_large if tried.frozen == best.frozen):
        where = "the whole base on each device" if tried.shards == 1 else f"the base spread over {tried.shards} devices"
        choices.reject(where, f"each needs about {format_bytes(tried.total_bytes)}")
    if fit.whole_bytes > best.total_bytes:
        choices.reject("keeping everything of all layers", f"needs about {format_bytes(fit.whole_bytes)}")
    if fit.larger is not None:
        found = fit.larger.chosen
        slower = f"slower: {describe(found.keeping)}"
        too_much = f"needs about {format_bytes(fit.larger.total_bytes)} at least"
        what = f"{format_tokens(found.keeping.micro_tokens)} at once"
        choices.reject(what, slower if found.fits else too_much)


def _share_prefix(choices: Choices, dropout: float) -> bool:
    """Rows that begin alike are computed once up to where they differ; with dropout each row has its own mask."""
    if dropout:
        choices.reject("computing shared prompts once", "lora.dropout gives each row its own mask")
    return dropout == 0.0


def _checkpoint(loaded: Loaded, choices: Choices, work: Work) -> CheckpointPlan:
    asked = loaded.recipe.checkpoint
    every = max(1, min(work.steps, round(CHECKPOINT_SECONDS / work.step_seconds)))
    return CheckpointPlan(
        every=choices.derived("checkpoint.every", asked.every, every, "about five minutes of training"),
        keep=choices.default("checkpoint.keep", asked.keep),
    )


def _run_folder(loaded: Loaded, choices: Choices, name: str) -> str:
    asked = loaded.recipe.run
    if asked is not None:
        return choices.said("run", loaded.resolve(asked))
    return choices.derived("run", None, str(Path(loaded.working_folder) / "runs" / name), "runs/NAME where you are")


def _validation_seconds(slot: SlotPlan, work: Work) -> float:
    """Validations cost forward passes: about a third of training on as many tokens."""
    if not work.validation_rows:
        return 0.0
    times = max(1, work.steps // slot.validation.every) if slot.validation.every else 1
    measured = min(work.validation_rows, slot.validation.rows or work.validation_rows)
    steps_each = measured / (work.rows * slot.limits.epochs / work.steps) if slot.limits.epochs else 1.0
    return times * steps_each * work.step_seconds / 3
