"""From recipes to a plan: find the base, look at the machine and the size of the data, decide.

This module knows no arithmetic (plan.decide) and no screens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tenon.plan.combine import combine
from tenon.plan.decide import decide
from tenon.plan.explain import ExplainRow, explain_rows
from tenon.plan.machine import read_machine
from tenon.plan.values import Plan
from tenon.recipe.load import Loaded, load_recipe
from tenon.runs.naming import default_run_folder
from tenon.service.bases import describe_base
from tenon.service.environment import require_training
from tenon.service.sizing import measure_data
from tenon.service.starting import find_start
from tenon.settings import Settings

RUNS_FOLDER = "runs"


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan and the recipes that it answers, one a slot."""

    plan: Plan
    loaded: tuple[Loaded, ...]

    @property
    def recipe_texts(self) -> dict[str, str]:
        """slot -> the recipe as given, with what the command line changed written above it."""
        return {slot.name: _text(loaded) for slot, loaded in zip(self.plan.slots, self.loaded, strict=True)}


def make_plan(
    recipes: Sequence[Path], overrides: Sequence[str], settings: Settings, *, now: datetime | None = None
) -> Planned:
    """Plan one run with a slot for each recipe; overrides apply to all of them.

    Raises RecipeError, BaseModelError, DataError, PlanError; UsageError usage-extra-missing.
    """
    require_training()
    loaded = tuple(load_recipe(path, overrides) for path in recipes)
    plan = combine([_plan_one(each, settings) for each in loaded])
    if any(each.recipe.run is None for each in loaded):
        plan = _in_free_folder(plan, now or datetime.now().astimezone())
    return Planned(plan, loaded)


def explain(recipe: Path, overrides: Sequence[str], settings: Settings) -> tuple[ExplainRow, ...]:
    """Every value of one recipe with where it came from. Raises as `make_plan`."""
    planned = make_plan([recipe], overrides, settings)
    return explain_rows(planned.loaded[0], planned.plan)


def _plan_one(loaded: Loaded, settings: Settings) -> Plan:
    base = describe_base(loaded.base_spec, settings)
    folder = Path(loaded.resolve(loaded.recipe.run)) if loaded.recipe.run else Path(loaded.working_folder)
    machine = read_machine(settings, run_folder=folder)
    plan = decide(loaded, base=base, machine=machine, data_size=measure_data(loaded, settings))
    spec = loaded.recipe.lora.start_from
    return plan if spec is None else _from_adapter(plan, find_start(spec, plan.slots[0].lora, base, settings))


def _from_adapter(plan: Plan, folder: str) -> Plan:
    (slot,) = plan.slots
    lora = slot.lora.model_copy(update={"start_from": folder})
    return plan.model_copy(update={"slots": (slot.model_copy(update={"lora": lora}),)})


def _in_free_folder(plan: Plan, now: datetime) -> Plan:
    """The plan with a run folder of its own: planning again never meets an older run."""
    planned = Path(plan.run_folder)
    folder = str(default_run_folder(planned.name, planned.parent, now=now))
    choices = tuple(
        choice.model_copy(update={"value": folder, "reason": "runs/NAME-TIME where you are"})
        if choice.key.rpartition(":")[2] == "run"
        else choice
        for choice in plan.choices
    )
    return plan.model_copy(update={"run_folder": folder, "choices": choices})


def _text(loaded: Loaded) -> str:
    typed = "".join(f"# {override}\n" for override in loaded.overrides)
    return f"# {loaded.file}\n{typed}{loaded.text}"
