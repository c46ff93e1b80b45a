"""Where training starts from when the recipe names an adapter: found, of the same base, and of the planned shape.

This module does not know what else is planned.
"""

from __future__ import annotations

from pathlib import Path

from tenon.errors import AdapterError, PlanError, RunError
from tenon.plan.values import BasePlan, LoraPlan
from tenon.registry.peft_check import AdapterFacts, describe_adapter
from tenon.service.subjects import BASE, open_subject
from tenon.settings import Settings

_CLOSE = 1e-6


def find_start(spec: str, lora: LoraPlan, base: BasePlan, settings: Settings) -> str:
    """The folder of what `lora.start_from` names: a folder, a registered adapter, or a run.

    lora: as planned, start_from a path made absolute. Raises AdapterError adapter-other-base and those of
    `describe_adapter`; PlanError plan-start-differs; RunError and AdapterError for what is not found.
    """
    place = lora.start_from if lora.start_from and Path(lora.start_from).exists() else None
    if place is None and ("/" in spec or spec == BASE):
        raise _no_adapter(spec)
    try:
        subject = open_subject(place or spec, base.path, settings).subject
    except RunError as error:
        raise error if error.code == "run-unfinished" else _no_adapter(spec) from error
    except AdapterError as error:
        if error.code != "adapter-other-base":
            raise
        hint = "start from an adapter of the recipe's base"
        raise AdapterError(error.code, f"lora.start_from: {error.what}", got=error.got, hint=hint) from error
    assert subject.folder is not None
    _require_shape(subject.label, describe_adapter(Path(subject.folder)), lora)
    return subject.folder


def _no_adapter(spec: str) -> AdapterError:
    return AdapterError(
        "adapter-missing",
        f"lora.start_from: {spec} is no adapter",
        hint="give a folder in PEFT's layout, a run, or a registered adapter: tenon adapters list",
    )


def _require_shape(label: str, found: AdapterFacts, lora: LoraPlan) -> None:
    """An adapter of another rank, scale or other matrices would not begin where it ended."""
    theirs = found.ranks_and_scales
    different = set(theirs) ^ set(lora.sites)
    if different:
        odd = min(different)
        raise PlanError(
            "plan-start-differs",
            f"lora.start_from: {label} {'adapts' if odd in theirs else 'does not adapt'} {odd}, the recipe does"
            + (" not" if odd in theirs else ""),
            hint="set lora.targets and lora.layers to those of the adapter",
        )
    for site, (rank, scale) in theirs.items():
        if rank != lora.rank or abs(scale - lora.scale) > _CLOSE * scale:
            raise PlanError(
                "plan-start-differs",
                f"lora.start_from: {label} has rank {rank} and scale {scale:g} at {site}",
                got=f"lora.rank {lora.rank}, scale {lora.scale:g}",
                hint=f"set lora.rank: {rank} and lora.alpha: {scale * (rank**0.5 if lora.rslora else rank):g}",
            )
