"""Which number formats a run computes in, and which ones its frozen base may be kept in, each with its reason.

What is kept follows from memory as well: `base_formats` gives the candidates in order of preference, `plan.fit` takes
the first that fits, and `explain_base` says why. Pure: this module knows no tensors.
"""

from __future__ import annotations

from tenon.bases.facts import ModelFacts
from tenon.errors import PlanError
from tenon.plan.choices import Choices
from tenon.plan.memory import base_bytes, stack_shapes
from tenon.plan.values import Frozen, MachineFacts, Precision
from tenon.recipe.load import Loaded
from tenon.recipe.schema import BaseChoice

# fp8 arithmetic exists from compute capability 8.9 (Ada) on; its products want sizes of whole sixteens.
FP8_CAPABILITY = (8, 9)
FP8_MULTIPLE = 16
# Share of a GPU's free memory that a base may take which only answers.
RESIDENT_SHARE = 0.8
DENSE, INT8 = Frozen(), Frozen(format="int8")
FP8_TWICE = Frozen(format="fp8", fp8_compute=True, fp8_twice=True)
FP8_ONCE = Frozen(format="fp8", fp8_compute=True)


def decide_compute(loaded: Loaded, choices: Choices, machine: MachineFacts) -> Precision:
    """The format of activations. Raises PlanError plan-precision."""
    asked = loaded.recipe.precision.compute
    precision: Precision = "fp32" if machine.device == "cpu" else "bf16" if machine.bf16 else "fp16"
    if loaded.recipe.precision.base == "bf16" and asked in (None, "auto"):
        _check_compute("bf16", machine, "precision.base: same")
        return choices.derived("precision.compute", None, "bf16", f"as precision.base{_slow_bf16(machine)}")
    if asked is None or asked == "auto":
        reasons = {
            "fp32": "exact, and the fastest on this CPU",
            "bf16": "half the memory, and the range of fp32",
            "fp16": "half the memory; this GPU has no bf16",
        }
        return choices.derived("precision.compute", None, precision, reasons[precision])
    _check_compute(asked, machine, f"precision: {precision}")
    slow = _slow_bf16(machine).removeprefix(", ") if asked == "bf16" else ""
    return choices.said("precision.compute", asked, slow)


def _check_compute(asked: Precision, machine: MachineFacts, instead: str) -> None:
    problem = ""
    if asked == "fp16" and machine.device == "cpu":
        problem = "fp16 is not computed on a CPU"
    elif asked == "bf16" and machine.device == "cuda" and not machine.bf16:
        problem = f"{machine.device_name} has no bf16"
    if problem:
        raise PlanError("plan-precision", f"precision {asked}: {problem}", got=asked, hint=f"set {instead}, or auto")


def _slow_bf16(machine: MachineFacts) -> str:
    slow = machine.device == "cpu" and not machine.bf16
    return ", about three times slower here than fp32" if slow else ""


def base_formats(
    loaded: Loaded, choices: Choices, facts: ModelFacts, *, machine: MachineFacts, precision: Precision
) -> tuple[Frozen, ...]:
    """What the base may be kept in, best first. Raises PlanError plan-precision."""
    asked, products = loaded.recipe.precision.base or "auto", loaded.recipe.precision.products
    problem = _fp8_problem(facts, machine, precision)
    on_gpu = machine.device == "cuda"
    nf4 = Frozen(format="nf4", fp8_compute=products == "fp8" or (products != "same" and on_gpu and not problem))
    if problem and (asked == "fp8" or products == "fp8"):
        key = "precision.base" if asked == "fp8" else "precision.products"
        raise PlanError(
            "plan-precision",
            f"{key} fp8: {problem}",
            got="fp8",
            hint="set precision.base: int8 or nf4, or auto" if asked == "fp8" else "set precision.products: same",
        )
    if asked == "auto":
        return _automatic(choices, facts, machine, nf4=nf4, problem=problem)
    if asked == "fp8":
        return (FP8_TWICE, FP8_ONCE) if on_gpu else (FP8_ONCE,)
    return ({"same": DENSE, "bf16": DENSE, "int8": INT8, "nf4": nf4}[asked],)


def _automatic(
    choices: Choices, facts: ModelFacts, machine: MachineFacts, *, nf4: Frozen, problem: str
) -> tuple[Frozen, ...]:
    if facts.stored == "nf4":
        return (nf4,)
    if machine.device == "cpu":
        return (DENSE,)
    if problem:
        choices.reject("a base in fp8", problem)
    return (DENSE, INT8 if problem else FP8_ONCE, nf4)


def resident_format(
    facts: ModelFacts, machine: MachineFacts, precision: Precision, asked: BaseChoice = "auto"
) -> Frozen:
    """What a base that only answers is kept in: unquantised where it leaves room for answers, as training chooses else.

    A CPU keeps it unquantised even where the files are nf4: every token would dequantise them anew.
    Raises PlanError plan-precision.
    """
    problem = _fp8_problem(facts, machine, precision)
    if asked == "fp8" and problem:
        raise PlanError(
            "plan-precision", f"a base in fp8: {problem}", got="fp8", hint="type --base-precision int8, nf4 or auto"
        )
    if asked != "auto":
        nf4 = Frozen(format="nf4", fp8_compute=machine.device == "cuda" and not problem)
        return {"same": DENSE, "bf16": DENSE, "int8": INT8, "fp8": FP8_ONCE, "nf4": nf4}[asked]
    if machine.device == "cpu":
        return DENSE
    for frozen in (DENSE, INT8 if problem else FP8_ONCE):
        if base_bytes(facts, precision, frozen) <= RESIDENT_SHARE * machine.device_memory_bytes:
            return frozen
    return Frozen(format="nf4", fp8_compute=not problem)


def _fp8_problem(facts: ModelFacts, machine: MachineFacts, precision: Precision) -> str:
    """Why fp8 products cannot be made here; "" when they can. A CPU imitates them, in any precision."""
    if machine.device == "cpu":
        return ""
    capability = machine.capability
    if capability is None or tuple(capability) < FP8_CAPABILITY:
        known = "unknown" if capability is None else f"{capability[0]}.{capability[1]}"
        return f"{machine.device_name} (compute capability {known}) does not multiply fp8, which takes 8.9 or later"
    if precision != "bf16":
        return f"fp8 products give bf16, and precision.compute is {precision}"
    odd = [size for shape in stack_shapes(facts) for size in shape if size % FP8_MULTIPLE]
    return f"its products take sizes that are multiples of {FP8_MULTIPLE}, and this base has {odd[0]}" if odd else ""


def explain_base(loaded: Loaded, choices: Choices, frozen: Frozen, *, facts: ModelFacts, machine: MachineFacts) -> None:
    """Record what was taken and why."""
    asked, products = loaded.recipe.precision.base, loaded.recipe.precision.products
    how = _how_kept(frozen, machine)
    if asked is not None and asked != "auto":
        choices.said("precision.base", asked, how)
    else:
        shown = "same" if frozen.format == "dense" else frozen.format
        why = _why(frozen, facts, machine)
        choices.derived("precision.base", None, shown, "; ".join(part for part in (why, how) if part))
    if frozen.format != "nf4":
        choices.unused("precision.products", "the base is not kept in nf4")
        return
    word = "fp8" if frozen.fp8_compute else "same"
    reason = "twice as fast as bf16; its error is small beside that of nf4" if frozen.fp8_compute else _no_fp8(machine)
    choices.derived("precision.products", None if products == "auto" else products, word, reason)


def _how_kept(frozen: Frozen, machine: MachineFacts) -> str:
    if frozen.format == "dense":
        return ""
    if frozen.format == "fp8" and machine.device == "cpu":
        return "a CPU only imitates fp8: the same rounding, in plain torch, almost twice as slow"
    if frozen.format == "fp8":
        kept = (
            "kept twice, the second time transposed" if frozen.fp8_twice else "kept once, transposed for each backward"
        )
        return f"both products in fp8; {kept}"
    return "dequantised for each product"


def _why(frozen: Frozen, facts: ModelFacts, machine: MachineFacts) -> str:
    if frozen.format == "dense":
        return "it fits unquantised" if machine.device == "cuda" else "unquantised: exact, and the fastest on a CPU"
    if facts.stored == frozen.format:
        return "the base's files are nf4 already"
    return "unquantised it does not fit" if frozen.format != "nf4" else "it does not fit otherwise"


def _no_fp8(machine: MachineFacts) -> str:
    return "a CPU only imitates fp8" if machine.device == "cpu" else "fp8 is not to be had here"
