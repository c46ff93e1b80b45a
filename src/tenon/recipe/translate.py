"""Entries under other tools' keys, put under ours, with where each came from; or the difference, as an error.

Knows the tables of `aliases`; does not know which of our keys exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tenon.errors import RecipeError
from tenon.recipe.aliases import ALWAYS, BY_KEY, DIFFERENT, FOREIGN_KEYS, NF4_DETAILS, PAIRED, Unset
from tenon.recipe.written import Written


@dataclass(frozen=True, slots=True)
class Translation:
    """Entries under our keys, and the foreign entries that say what Tenon does anyway."""

    entries: tuple[Written, ...]
    always: tuple[Written, ...]


def translate(entries: Mapping[str, Written]) -> Translation:
    """Entries under our own keys. Entries of neither tool nor Tenon pass through, for the caller to refuse.

    Raises RecipeError: recipe-alias-differs, recipe-alias-clash.
    """
    given = {key: entry for key, entry in entries.items() if key not in FOREIGN_KEYS or entry.value is not None}
    ours: dict[str, Written] = {}
    always: list[Written] = []
    for key, entry in given.items():
        if key in PAIRED or _is_qlora(entry):
            continue
        if (key in ALWAYS and _same(entry.value, ALWAYS[key])) or key in _strategies(given):
            always.append(entry)
        elif key in DIFFERENT:
            raise _differs(entry, DIFFERENT[key])
        elif key in ALWAYS:
            raise _differs(entry, f"only {ALWAYS[key]!r} is what Tenon does")
        else:
            for one in _ours(entry):
                _add(ours, one)
    for one in (*_batch_rows(given), *_precision(given), *_base_format(given)):
        _add(ours, one)
    return Translation(tuple(ours.values()), tuple(always))


def _ours(entry: Written) -> list[Written]:
    alias = BY_KEY.get(entry.key)
    if alias is None:
        return [entry]
    try:
        value = entry.value if alias.convert is None else alias.convert(entry.value)
    except ValueError as error:
        raise _differs(entry, str(error)) from error
    if isinstance(value, Unset):
        return []
    found = [_renamed(entry, alias.canonical, value)]
    if alias.canonical == "schedule.kind" and entry.value == "constant":
        # transformers ignores any warm-up with `constant`; `constant_with_warmup` is the one that has it.
        found.append(_renamed(entry, "schedule.warmup", 0.0))
    return found


def _renamed(entry: Written, canonical: str, value: Any) -> Written:
    return Written(canonical, value, "alias", f"{entry.where}, as {entry.key}")


def _add(ours: dict[str, Written], one: Written) -> None:
    """Two keys for one thing are fine while they agree."""
    other = ours.get(one.key)
    if other is not None and not _same(other.value, one.value):
        raise RecipeError(
            "recipe-alias-clash",
            f"`{one.key}` is set twice: {other.where} and {one.where}",
            got=f"{other.value!r} and {one.value!r}",
            hint=f"keep one: {one.key}",
        )
    if other is None:
        ours[one.key] = one


def _batch_rows(given: Mapping[str, Written]) -> list[Written]:
    """rows of a step on one device = rows at once x accumulation steps."""
    at_once = [given[key] for key in ("per_device_train_batch_size", "micro_batch_size") if key in given]
    steps = given.get("gradient_accumulation_steps")
    if not at_once and steps is None:
        return []
    if not at_once and steps is not None:
        raise _differs(steps, "alone it does not say the rows of a step: write batch.rows, their product")
    factors = [*at_once, *([steps] if steps is not None else [])]
    for factor in factors:
        if not isinstance(factor.value, int) or isinstance(factor.value, bool) or factor.value < 1:
            raise _differs(factor, "only a whole number from 1 on has an equal: write batch.rows")
    if len(at_once) > 1:
        raise _differs(at_once[1], "both keys say the rows at once: keep one, or write batch.rows")
    rows = at_once[0].value * (steps.value if steps is not None else 1)
    names = " x ".join(factor.key for factor in factors)
    return [Written("batch.rows", rows, "alias", f"{at_once[0].where}, as {names}")]


def _precision(given: Mapping[str, Written]) -> list[Written]:
    """bf16 and fp16 are two switches of one thing."""
    on = [given[key] for key in ("bf16", "fp16") if key in given and given[key].value is not False]
    off = [given[key] for key in ("bf16", "fp16") if key in given and given[key].value is False]
    if not on and not off:
        return []
    if not on:
        raise _differs(off[0], "the other precisions remain open: write precision: fp32")
    if len(on) > 1:
        raise _differs(on[1], "two precisions at once: write precision: bf16 or fp16")
    if on[0].value is not True and (on[0].key, on[0].value) != ("bf16", "auto"):
        raise _differs(on[0], "only true and false mean the same: write precision")
    return [_renamed(on[0], "precision.compute", on[0].key if on[0].value is True else "auto")]


def _is_qlora(entry: Written) -> bool:
    return entry.key == "adapter" and entry.value == "qlora"


def _base_format(given: Mapping[str, Written]) -> list[Written]:
    """nf4 with double quantisation is said in three ways, each with a key that says so beside the one for 4 bits."""
    four, eight, bits = (given.get(key) for key in ("load_in_4bit", "load_in_8bit", "quantization_bit"))
    details = [given[key] for key in NF4_DETAILS if key in given]
    qlora = [entry for entry in given.values() if _is_qlora(entry)]
    if eight is not None and eight.value is not False:
        raise _differs(eight, DIFFERENT["load_in_8bit"])
    if four is not None and not isinstance(four.value, bool):
        raise _differs(four, "only true and false mean the same")
    if bits is not None and (bits.value != 4 or isinstance(bits.value, bool)):
        raise _differs(bits, "only 4 has an equal, precision.base: nf4; int8 there multiplies otherwise")
    for entry in details:
        if not any(_same(entry.value, value) for value in NF4_DETAILS[entry.key]):
            raise _differs(entry, "precision.base: nf4 is bitsandbytes' nf4 with double quantisation, nothing else")
    asked = [*qlora, *([four] if four is not None and four.value else []), *([bits] if bits is not None else [])]
    if asked:
        return _nf4(asked, four, details)
    if details:
        raise _differs(details[0], "without a key that asks for 4 bits it says nothing: write precision.base: nf4")
    unquantised = [entry for entry in (four, eight) if entry is not None]
    return [_renamed(unquantised[0], "precision.base", "same")] if unquantised else []


def _nf4(asked: list[Written], four: Written | None, details: list[Written]) -> list[Written]:
    """asked: the entries that ask for 4 bits. load_in_4bit alone has no double quantisation in TRL, but in axolotl."""
    if four is not None and not four.value:
        raise _differs(asked[0], f"and {four.where} says load_in_4bit: false: keep one of the two")
    double = {"bnb_4bit_use_double_quant", "use_bnb_nested_quant"}
    if asked == [four] and not any(entry.key in double for entry in details):
        raise _differs(
            asked[0],
            "alone it is nf4 with double quantisation in axolotl, and without in TRL: add adapter: qlora or "
            "use_bnb_nested_quant: true, or write precision.base: nf4",
        )
    return [_renamed(asked[0], "precision.base", "nf4")]


def _strategies(given: Mapping[str, Written]) -> frozenset[str]:
    """`eval_strategy: steps` says nothing more than its `eval_steps`."""
    wanted = (("save_strategy", "save_steps"), ("eval_strategy", "eval_steps"), ("evaluation_strategy", "eval_steps"))
    return frozenset(key for key, steps in wanted if key in given and given[key].value == "steps" and steps in given)


def refuse_overridden_epochs(given: Mapping[str, Written]) -> None:
    """max_steps beside epochs means something else there. Raises RecipeError: recipe-alias-differs."""
    steps = given.get("max_steps")
    if steps is None or not isinstance(steps.value, int) or steps.value <= 0:
        return
    for key in ("num_epochs", "num_train_epochs"):
        if key in given:
            raise _differs(steps, f"there it overrides {key}; here a run ends at whichever comes first: keep one")


def _same(a: Any, b: Any) -> bool:
    """Equal, and not merely 1 == True."""
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def _differs(entry: Written, why: str) -> RecipeError:
    return RecipeError(
        "recipe-alias-differs",
        f"{entry.where}: `{entry.key}` has no exact equal here: {why}",
        got=repr(entry.value),
        hint="see the tables of docs/recipe.md for the keys of other tools",
    )
