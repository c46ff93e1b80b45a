"""Keys that do not apply to this run: an error, never ignored. Knows the recipe alone, not the base or the machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tenon.errors import RecipeError
from tenon.recipe.defaults import DEFAULTS
from tenon.recipe.schema import Recipe, ServeSection


@dataclass(frozen=True, slots=True)
class Rule:
    """`key` may be given only where `applies`; `why` says what it needs or clashes with, `hint` what to do."""

    key: str
    applies: Callable[[Recipe], bool]
    why: str
    hint: str


def _schedule_is(*kinds: str) -> Callable[[Recipe], bool]:
    return lambda recipe: (recipe.schedule.kind or DEFAULTS["schedule.kind"].value) in kinds


def _optimizer_is(*kinds: str) -> Callable[[Recipe], bool]:
    return lambda recipe: (recipe.optimizer.kind or DEFAULTS["optimizer.kind"].value) in kinds


def _holds_out(recipe: Recipe) -> bool:
    return recipe.data.validation is None and bool(recipe.data.heldout)


def _validates(recipe: Recipe) -> bool:
    """Validation rows are given, or may still be held out by default."""
    return recipe.data.validation is not None or recipe.data.heldout != 0.0


def _evaluates(recipe: Recipe) -> bool:
    return recipe.evaluate.metrics != ()


def _registers(recipe: Recipe) -> bool:
    return recipe.register_as is not False


_ADAM = _optimizer_is("adamw", "adamw8bit")
_NO_ADAM = "it belongs to Adam, and optimizer.kind is sgd"
_NO_VALIDATION = "there are no validation rows: data.heldout is 0 and data.validation is not given"
_GIVE_ROWS = "give data.validation, or a data.heldout above 0"
_NO_EVALUATION = "evaluate.metrics is empty, so nothing is evaluated"

RULES: tuple[Rule, ...] = (
    Rule("data.heldout", lambda r: r.data.validation is None, "data.validation is given", "keep one of the two"),
    Rule(
        "data.heldout_by",
        _holds_out,
        "nothing is held out by the recipe: data.heldout is not above 0",
        "set data.heldout",
    ),
    Rule(
        "lora.init", lambda r: r.lora.start_from is None, "the weights come from lora.start_from", "keep one of the two"
    ),
    Rule("optimizer.beta1", _ADAM, _NO_ADAM, "leave it out, or set optimizer.kind: adamw"),
    Rule("optimizer.beta2", _ADAM, _NO_ADAM, "leave it out, or set optimizer.kind: adamw"),
    Rule("optimizer.eps", _ADAM, _NO_ADAM, "leave it out, or set optimizer.kind: adamw"),
    Rule(
        "optimizer.momentum",
        _optimizer_is("sgd"),
        "it belongs to SGD, and optimizer.kind is not sgd",
        "leave it out, or set optimizer.kind: sgd",
    ),
    Rule(
        "schedule.decay",
        _schedule_is("wsd"),
        "only the schedule wsd has a decay of its own",
        "leave it out, or set schedule.kind: wsd",
    ),
    Rule(
        "schedule.cycles",
        _schedule_is("cosine_restarts"),
        "only the schedule cosine_restarts has cycles",
        "leave it out, or set schedule.kind: cosine_restarts",
    ),
    Rule(
        "schedule.floor",
        _schedule_is("cosine", "cosine_restarts", "linear", "wsd"),
        "a constant schedule never falls",
        "leave it out",
    ),
    Rule("batch.rows", lambda r: r.batch.tokens is None, "batch.tokens is given", "keep one of the two"),
    Rule("validation.every", _validates, _NO_VALIDATION, _GIVE_ROWS),
    Rule("validation.metric", _validates, _NO_VALIDATION, _GIVE_ROWS),
    Rule("validation.rows", _validates, _NO_VALIDATION, _GIVE_ROWS),
    Rule(
        "validation.patience",
        lambda r: bool(r.validation.every),
        "validation.every is not set above 0, so there is nothing to wait for",
        "set validation.every to the steps between validations",
    ),
    Rule(
        "validation.min_delta",
        lambda r: r.validation.patience is not None,
        "validation.patience is not set",
        "set validation.patience, or leave it out",
    ),
    Rule(
        "precision.base",
        lambda r: not (r.precision.base == "bf16" and r.precision.compute in ("fp32", "fp16")),
        "bf16 sets precision.compute too, and that says otherwise",
        "leave one of the two out; precision.base: same is as precision.compute",
    ),
    Rule(
        "precision.products",
        lambda r: r.precision.base == "nf4",
        "only an nf4 base can be multiplied in two ways, and precision.base is not nf4",
        "leave it out, or set precision.base: nf4",
    ),
    Rule("evaluate.data", _evaluates, _NO_EVALUATION, "leave it out, or name metrics"),
    Rule("evaluate.rows", _evaluates, _NO_EVALUATION, "leave it out, or name metrics"),
    *(
        Rule(f"serve.{name}", _registers, "the adapter is not registered", "leave it out, or set register: true")
        for name in ServeSection.model_fields
    ),
)


def refuse_inapplicable(recipe: Recipe, where: Mapping[str, str]) -> None:
    """Refuse the first given key that does not apply. where: given key -> where it was written.

    Raises RecipeError: recipe-inapplicable.
    """
    for rule in RULES:
        if rule.key in where and not rule.applies(recipe):
            raise RecipeError(
                "recipe-inapplicable",
                f"{where[rule.key]}: `{rule.key}` does not apply to this run: {rule.why}",
                hint=rule.hint,
            )
