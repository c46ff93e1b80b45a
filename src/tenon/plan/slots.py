"""The parts of one slot, each from the recipe's section, the base and the data: every open question answered.

Pure: knows no files; paths were made absolute by the loaded recipe.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from tenon.bases.facts import ModelFacts
from tenon.errors import PlanError
from tenon.plan.choices import Choices
from tenon.plan.size import DataSize
from tenon.plan.targets import check_rank, resolve_sites, serving_rank
from tenon.plan.values import (
    BatchPlan,
    DataPlan,
    EvaluationPlan,
    Generation,
    LimitsPlan,
    LoraPlan,
    MachineFacts,
    OptimizerPlan,
    SchedulePlan,
    ServingPlan,
    SourcePlan,
    ValidationPlan,
)
from tenon.recipe.load import Loaded
from tenon.recipe.schema import Source
from tenon.runs.metric_table import metric_facts

OptimizerKind = Literal["adamw", "sgd", "adamw8bit"]
ScheduleKind = Literal["cosine", "cosine_restarts", "linear", "constant", "wsd"]
InitKind = Literal["kaiming", "gaussian", "orthogonal"]

DEFAULT_MAX_TOKENS = 2048
DEFAULT_EPOCHS = 3.0
HELDOUT_SHARE, HELDOUT_ROWS, HELDOUT_FROM_ROWS = 0.05, 500, 200
MAX_WORKERS = 16
# Peak learning rates by parameters of the base: about ten times those of full fine-tuning; small bases take more.
LEARNING_RATES: tuple[tuple[float, float], ...] = ((0.5e9, 1e-3), (3e9, 5e-4), (math.inf, 2e-4))
SGD_FACTOR = 100.0
RSLORA_ALPHA = 8.0


def decide_lora(loaded: Loaded, choices: Choices, facts: ModelFacts) -> LoraPlan:
    """Rank, scale and every adapted matrix. Raises PlanError: plan-target-…, plan-layer, plan-rank-…."""
    asked = loaded.recipe.lora
    rank = choices.default("lora.rank", asked.rank)
    rslora = choices.default("lora.rslora", asked.rslora)
    if rslora:
        alpha = choices.derived("lora.alpha", asked.alpha, RSLORA_ALPHA, "the scale of alpha = 2 x rank at rank 16")
    else:
        alpha = choices.derived(
            "lora.alpha", asked.alpha, 2.0 * rank, "2 x rank: the scale stays when the rank changes"
        )
    targets = choices.default("lora.targets", asked.targets)
    layers = choices.default("lora.layers", asked.layers)
    sites = resolve_sites(facts, targets, layers)
    check_rank(facts, sites, rank)
    start_from = choices.default("lora.start_from", asked.start_from)
    init: InitKind = "kaiming"
    if start_from is None:
        init = choices.default("lora.init", asked.init)
    else:
        choices.unused("lora.init", "the weights come from lora.start_from")
    if serving_rank(rank) > 16:
        choices.reject("serving with vLLM's default", f"rank {rank} needs --max-lora-rank {serving_rank(rank)} there")
    return LoraPlan(
        rank=rank,
        alpha=alpha,
        rslora=rslora,
        scale=alpha / (math.sqrt(rank) if rslora else rank),
        dropout=choices.default("lora.dropout", asked.dropout),
        init=init,
        sites=sites,
        start_from=None if start_from is None else loaded.resolve(start_from),
    )


def decide_optimizer(loaded: Loaded, choices: Choices, facts: ModelFacts, machine: MachineFacts) -> OptimizerPlan:
    """Raises PlanError plan-optimizer for 8-bit Adam without a GPU."""
    asked = loaded.recipe.optimizer
    kind: OptimizerKind = choices.default("optimizer.kind", asked.kind)
    if kind == "adamw8bit" and machine.device != "cuda":
        raise PlanError(
            "plan-optimizer",
            "optimizer.kind adamw8bit needs a GPU, and this run computes on the CPU",
            hint="set optimizer.kind: adamw",
        )
    adam = kind != "sgd"
    rate = next(rate for bound, rate in LEARNING_RATES if facts.parameters < bound) * (1.0 if adam else SGD_FACTOR)
    reason = f"about ten times full fine-tuning, for a base of {facts.parameters / 1e9:.2g}B parameters"
    for key in ("optimizer.momentum",) if adam else ("optimizer.beta1", "optimizer.beta2", "optimizer.eps"):
        choices.unused(key, f"optimizer.kind is {kind}")
    return OptimizerPlan(
        kind=kind,
        lr=choices.derived("optimizer.lr", asked.lr, rate, reason),
        b_ratio=choices.default("optimizer.b_ratio", asked.b_ratio),
        weight_decay=choices.default("optimizer.weight_decay", asked.weight_decay),
        beta1=choices.default("optimizer.beta1", asked.beta1) if adam else 0.9,
        beta2=choices.default("optimizer.beta2", asked.beta2) if adam else 0.999,
        eps=choices.default("optimizer.eps", asked.eps) if adam else 1e-8,
        momentum=0.0 if adam else choices.default("optimizer.momentum", asked.momentum),
        clip_norm=choices.default("optimizer.clip_norm", asked.clip_norm),
    )


def decide_data(
    loaded: Loaded, choices: Choices, facts: ModelFacts, *, machine: MachineFacts, size: DataSize, seed: int
) -> DataPlan:
    """Raises PlanError plan-context for rows longer than the base can read."""
    asked = loaded.recipe.data
    longest = min(facts.context_tokens, DEFAULT_MAX_TOKENS)
    why = "the base's context" if longest < DEFAULT_MAX_TOKENS else "longer rows are rare, and cost memory"
    max_tokens = choices.derived("data.max_tokens", asked.max_tokens, longest, why)
    if max_tokens > facts.context_tokens:
        raise PlanError(
            "plan-context",
            f"data.max_tokens {max_tokens} is more than the base's context of {facts.context_tokens} tokens",
            got=str(max_tokens),
            hint=f"set data.max_tokens to at most {facts.context_tokens}",
        )
    choices.said("data.train", [source.path for source in asked.train])
    validation = _sources(loaded, asked.validation)
    choices.derived("data.validation", asked.validation and [s.path for s in asked.validation], None, "not given")
    template = choices.default("data.template", asked.template)
    return DataPlan(
        train=_sources(loaded, asked.train),
        validation=validation,
        heldout=_heldout(loaded, choices, size),
        heldout_by=choices.default("data.heldout_by", asked.heldout_by),
        max_tokens=max_tokens,
        on_long=choices.default("data.on_long", asked.on_long),
        on_bad=choices.default("data.on_bad", asked.on_bad),
        on_duplicate=choices.default("data.on_duplicate", asked.on_duplicate),
        supervise=choices.default("data.supervise", asked.supervise),
        system=choices.default("data.system", asked.system),
        prompt=choices.default("data.prompt", asked.prompt),
        template=None if template is None else loaded.resolve(template),
        shuffle=choices.default("data.shuffle", asked.shuffle),
        seed=seed,
        workers=choices.derived(
            "data.workers", asked.workers, max(1, min(machine.cores, MAX_WORKERS)), "one for each core"
        ),
    )


def _heldout(loaded: Loaded, choices: Choices, size: DataSize) -> float:
    recipe = loaded.recipe
    if recipe.data.validation is not None:
        choices.unused("data.heldout", "data.validation is given")
        return 0.0
    asked_for = any(loaded.origin(f"validation.{name}") is not None for name in ("every", "metric", "rows"))
    if recipe.evaluate.data is not None and not asked_for:
        share, reason = 0.0, "evaluate.data is given, so every row trains"
    elif size.rows < HELDOUT_FROM_ROWS and not asked_for:
        share, reason = 0.0, f"with {size.rows} rows every one is needed for training"
    else:
        share = round(min(HELDOUT_SHARE, HELDOUT_ROWS / max(size.rows, 1)), 6)
        reason = f"5% of the rows, at most {HELDOUT_ROWS}, to see what was learned"
    return choices.derived("data.heldout", recipe.data.heldout, share, reason)


def train_rows(data: DataPlan, size: DataSize) -> int:
    """Rows that train. Raises PlanError plan-no-rows when none is left."""
    rows = size.rows - (heldout_rows(data, size) if data.heldout else 0)
    if rows < 1:
        raise PlanError(
            "plan-no-rows",
            "no row is left to train on",
            got=f"{size.rows} rows, data.heldout {data.heldout:g}",
            hint="add rows to data.train, or set data.heldout: 0",
        )
    return rows


def heldout_rows(data: DataPlan, size: DataSize) -> int:
    """Rows that are kept from training: a share, at least one."""
    return max(1, round(data.heldout * size.rows)) if data.heldout else 0


def decide_batch(loaded: Loaded, choices: Choices) -> BatchPlan:
    """Rows or tokens of one step; exactly one is above zero."""
    asked = loaded.recipe.batch
    if asked.tokens is not None:
        choices.said("batch.tokens", asked.tokens)
        choices.unused("batch.rows", "batch.tokens is given")
        return BatchPlan(rows=0, tokens=asked.tokens)
    choices.default("batch.tokens", asked.tokens)
    return BatchPlan(rows=choices.default("batch.rows", asked.rows), tokens=0)


def decide_limits(loaded: Loaded, choices: Choices) -> LimitsPlan:
    """Epochs, unless steps or minutes bound the run."""
    asked = loaded.recipe.limits
    bounded = asked.steps is not None or asked.minutes is not None
    epochs = choices.derived(
        "limits.epochs",
        asked.epochs,
        None if bounded else DEFAULT_EPOCHS,
        "steps or minutes end the run" if bounded else "small data sets gain from a second and third look",
    )
    steps = choices.derived("limits.steps", asked.steps, None, "no such limit")
    minutes = choices.default("limits.minutes", asked.minutes)
    return LimitsPlan(epochs=epochs or 0.0, steps=steps or 0, minutes=minutes or 0.0)


def decide_schedule(loaded: Loaded, choices: Choices, *, steps: int, exact: bool) -> SchedulePlan:
    """Warm-up in steps becomes a share of the run. Raises PlanError plan-schedule when the parts exceed the run."""
    asked = loaded.recipe.schedule
    kind: ScheduleKind = choices.default("schedule.kind", asked.kind)
    warmup = _warmup_share(choices, asked.warmup, steps)
    if kind == "wsd":
        decay = choices.default("schedule.decay", asked.decay)
    else:
        decay = 0.0
        choices.unused("schedule.decay", f"schedule.kind is {kind}")
    if kind == "cosine_restarts":
        cycles = choices.default("schedule.cycles", asked.cycles)
    else:
        cycles = 1
        choices.unused("schedule.cycles", f"schedule.kind is {kind}")
    if kind == "constant":
        floor = 0.0
        choices.unused("schedule.floor", "schedule.kind is constant")
    else:
        floor = choices.default("schedule.floor", asked.floor)
    if warmup + decay > 1.0 or (warmup >= 1.0 and exact):
        raise PlanError(
            "plan-schedule",
            f"warm-up and decay are longer than the run of {'' if exact else 'about '}{steps} steps",
            got=f"warm-up {warmup:.0%}, decay {decay:.0%}",
            hint="lower schedule.warmup or schedule.decay, or raise limits.epochs",
        )
    return SchedulePlan(kind=kind, warmup=min(warmup, 1.0), decay=decay, cycles=cycles, floor=floor)


def _warmup_share(choices: Choices, asked: float | None, steps: int) -> float:
    if asked is None or asked < 1:
        return choices.default("schedule.warmup", asked)
    share = asked / max(steps, 1)
    choices.said("schedule.warmup", asked, f"{asked:g} of {steps} steps: {min(share, 1.0):.1%} of the run")
    return share


def decide_validation(loaded: Loaded, choices: Choices, *, rows: int, steps: int) -> ValidationPlan:
    """How often and on how many rows; nothing without validation rows. Raises RecipeError recipe-metric-unknown."""
    asked = loaded.recipe.validation
    if asked.metric is not None:
        metric_facts(asked.metric, key="validation.metric")
    every = max(1, round(steps / 10)) if rows else 0
    reason = "a tenth of the run" if rows else "there are no validation rows"
    patience = choices.default("validation.patience", asked.patience)
    return ValidationPlan(
        every=choices.derived("validation.every", asked.every, every, reason),
        metric=choices.default("validation.metric", asked.metric),
        patience=patience or 0,
        min_delta=choices.default("validation.min_delta", asked.min_delta),
        rows=choices.default("validation.rows", asked.rows),
        max_new_tokens=choices.default("evaluate.max_new_tokens", loaded.recipe.evaluate.max_new_tokens),
    )


def decide_evaluation(loaded: Loaded, choices: Choices, *, validation_rows: int, max_new_tokens: int) -> EvaluationPlan:
    """What is measured after training; nothing when there are no rows for it, or the recipe names no metric.

    Raises RecipeError recipe-metric-unknown.
    """
    asked = loaded.recipe.evaluate
    for name in asked.metrics or ():
        metric_facts(name, key="evaluate.metrics")
    has_rows = asked.data is not None or validation_rows > 0
    choices.default("evaluate.data", asked.data and tuple(source.path for source in asked.data))
    reason = "chosen by the kind of rows" if has_rows else "there are no rows to evaluate on"
    metrics = choices.derived("evaluate.metrics", asked.metrics, (), reason, shown="auto" if has_rows else "none")
    return EvaluationPlan(
        sources=_sources(loaded, asked.data),
        metrics=metrics,
        rows=choices.default("evaluate.rows", asked.rows),
        max_new_tokens=max_new_tokens,
        enabled=has_rows and asked.metrics != (),
    )


def decide_serving(loaded: Loaded, choices: Choices, *, registered: bool) -> ServingPlan:
    """What is kept with the adapter; nothing where it is not registered."""
    asked = loaded.recipe.serve
    if not registered:
        for name in type(asked).model_fields:
            choices.unused(f"serve.{name}", "the adapter is not registered")
        return ServingPlan()
    given = {name: choices.default(f"serve.{name}", getattr(asked, name)) for name in Generation.model_fields}
    return ServingPlan(
        probes=choices.default("serve.probes", asked.probes), generation=Generation.model_validate(given)
    )


def slot_name(loaded: Loaded, choices: Choices) -> str:
    """The adapter's name: the recipe's, or the file's."""
    stem = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in Path(loaded.file).stem)
    return choices.derived("name", loaded.recipe.name, stem.strip("._-")[:64] or "adapter", "the recipe file's name")


def register_name(loaded: Loaded, choices: Choices, name: str) -> str | None:
    """The name in the registry, or None."""
    asked = choices.default("register", loaded.recipe.register_as)
    if isinstance(asked, str):
        return asked
    return name if asked else None


def _sources(loaded: Loaded, sources: tuple[Source, ...] | None) -> tuple[SourcePlan, ...]:
    return tuple(
        SourcePlan(
            path=loaded.resolve_source(source.path), weight=source.weight, format=source.format, columns=source.columns
        )
        for source in sources or ()
    )
