"""What the base is kept in: chosen with its reason, refused where it cannot be, and counted in bytes."""

from __future__ import annotations

import pytest

from tenon.bases.facts import ModelFacts
from tenon.errors import PlanError
from tenon.plan.combine import combine
from tenon.plan.explain import plan_rows
from tenon.plan.memory import base_bytes, dequantised_bytes, stack_shapes
from tenon.plan.precision import DENSE, FP8_ONCE, FP8_TWICE, INT8, resident_format
from tenon.plan.size import DataSize
from tenon.plan.values import Frozen, MachineFacts, Plan

from .situations import A100, CPU, GB, H100, LLAMA_8B, SMALL, SMOLLM2_135M, T4, choice, plan_of

NF4, NF4_IN_FP8 = Frozen(format="nf4"), Frozen(format="nf4", fp8_compute=True)
LONG = DataSize(rows=1000, mean_tokens=900.0, longest_tokens=2000, exact=True)
ODD = SMOLLM2_135M.model_copy(update={"feed_forward": 1544})
STORED = LLAMA_8B.model_copy(update={"stored": "nf4"})


def of(machine: MachineFacts, gigabytes: float) -> MachineFacts:
    return machine.model_copy(update={"device_memory_bytes": round(gigabytes * GB)})


def large(*overrides: str, machine: MachineFacts, facts: ModelFacts = LLAMA_8B) -> Plan:
    return plan_of(*overrides, facts=facts, machine=machine, size=LONG)


@pytest.mark.parametrize(
    ("machine", "taken"),
    [
        (of(H100, 80), DENSE),
        (of(H100, 22), DENSE),
        (of(H100, 16), FP8_ONCE),
        (of(H100, 11.5), NF4_IN_FP8),
        (of(A100, 22), DENSE),
        (of(A100, 16), INT8),
        (of(A100, 11.5), NF4),
        (of(T4, 15), INT8),
        (of(T4, 11.5), NF4),
    ],
)
def test_the_best_format_that_fits(machine: MachineFacts, taken: Frozen) -> None:
    plan = large(machine=machine)
    assert plan.frozen == taken
    assert plan.precision == ("bf16" if machine.bf16 else "fp16")
    found = choice(plan, "precision.base")
    assert found.origin == "derived"
    assert found.value == ("same" if taken == DENSE else taken.format)
    assert ("it does not fit" in found.reason) == (taken != DENSE)
    rejected = [rejection.what for rejection in plan.rejected]
    assert ("a base unquantised" in rejected) == (taken != DENSE)
    if machine.capability == (8, 0):
        assert "a base in fp8" in rejected


def test_a_cpu_keeps_the_base_as_it_computes_unless_told() -> None:
    plan = plan_of()
    assert plan.frozen == DENSE and "fastest on a CPU" in choice(plan, "precision.base").reason
    told = (("fp8", FP8_ONCE, "a CPU only imitates fp8"), ("int8", INT8, "dequantised"), ("nf4", NF4, "dequantised"))
    for word, frozen, why in told:
        asked = plan_of(f"precision.base={word}")
        assert (asked.frozen, asked.precision) == (frozen, "fp32")
        assert why in choice(asked, "precision.base").reason
        assert asked.estimate.seconds > 1.05 * plan.estimate.seconds
        assert plan_of(f"precision={word}").frozen == frozen


def test_fp8_is_kept_twice_where_there_is_room() -> None:
    assert large("precision.base=fp8", machine=of(H100, 80)).frozen == FP8_TWICE
    plan = large("precision.base=fp8", machine=of(H100, 16))
    assert plan.frozen == FP8_ONCE
    assert "transposed for each backward" in choice(plan, "precision.base").reason
    # Rather than computing anything twice, the second copy is given up.
    assert large("precision.base=fp8", machine=of(H100, 32)).keeping.counts == (32, 0, 0, 0)


def test_bf16_sets_the_compute_format_too() -> None:
    plan = plan_of("precision.base=bf16")
    assert (plan.frozen, plan.precision) == (DENSE, "bf16")
    assert choice(plan, "precision.compute").reason.startswith("as precision.base, about three times slower")
    assert plan_of("precision.base=bf16", "precision.compute=bf16").precision == "bf16"


@pytest.mark.parametrize(
    ("overrides", "machine", "facts", "told", "remedy"),
    [
        (("base=fp8",), A100, LLAMA_8B, "A100-SXM4-40GB (compute capability 8.0) does not multiply fp8", "base: int8"),
        (("base=fp8",), T4, SMOLLM2_135M, "which takes 8.9 or later", "base: int8"),
        (("base=fp8",), H100.model_copy(update={"capability": None}), SMOLLM2_135M, "unknown", "base: int8"),
        (("base=fp8", "compute=fp32"), H100, SMOLLM2_135M, "fp8 products give bf16", "base: int8"),
        (("base=fp8",), H100, ODD, "multiples of 16, and this base has 1544", "base: int8"),
        (("base=nf4", "products=fp8"), A100, SMOLLM2_135M, "precision.products fp8: ", "products: same"),
        (("base=bf16",), T4, SMOLLM2_135M, "Tesla T4 has no bf16", "base: same"),
    ],
)
def test_fp8_that_cannot_be_is_refused_with_what_works(
    overrides: tuple[str, ...], machine: MachineFacts, facts: ModelFacts, told: str, remedy: str
) -> None:
    with pytest.raises(PlanError) as caught:
        plan_of(*(f"precision.{one}" for one in overrides), machine=machine, facts=facts)
    error = caught.value
    assert error.code == "plan-precision" and told in error.what
    assert error.hint.startswith(f"set precision.{remedy}")
    key, _, value = remedy.partition(": ")
    mended = dict(one.split("=") for one in overrides) | {key: value}
    assert plan_of(*(f"precision.{key}={value}" for key, value in mended.items()), machine=machine, facts=facts)


def test_products_of_nf4() -> None:
    assert plan_of("precision.base=nf4", machine=H100).frozen == NF4_IN_FP8
    assert plan_of("precision.base=nf4", "precision.products=same", machine=H100).frozen == NF4
    assert plan_of("precision.base=nf4", "precision.products=auto", machine=A100).frozen == NF4
    assert plan_of("precision.base=nf4", machine=H100, facts=ODD).frozen == NF4
    assert plan_of("precision.base=nf4", "precision.compute=fp32", machine=H100).frozen == NF4
    assert plan_of("precision.base=nf4", "precision.products=fp8").frozen == NF4_IN_FP8
    assert choice(plan_of("precision.base=nf4", machine=H100), "precision.products").value == "fp8"


def test_files_that_are_nf4_stay_nf4() -> None:
    plan = large(machine=H100, facts=STORED)
    assert plan.frozen == NF4_IN_FP8
    assert "the base's files are nf4 already" in choice(plan, "precision.base").reason
    assert large("precision.base=same", machine=H100, facts=STORED).frozen == DENSE


def test_bytes_of_an_8b_base() -> None:
    """16.06 GB in bf16, of which 2.1 GB are embeddings and head, which stay; the linear layers shrink."""
    linear, rest = LLAMA_8B.linear_parameters, LLAMA_8B.parameters - LLAMA_8B.linear_parameters
    kept = {frozen: base_bytes(LLAMA_8B, "bf16", frozen) for frozen in (DENSE, FP8_TWICE, FP8_ONCE, INT8, NF4)}
    assert kept[DENSE] == kept[FP8_TWICE] == 2 * LLAMA_8B.parameters
    assert kept[FP8_ONCE] == kept[INT8] == linear + 2 * rest
    assert kept[NF4] == pytest.approx(0.5159 * linear + 2 * rest, rel=1e-4)
    widest = 28_672 * 4_096
    for frozen, wanted in ((DENSE, 0), (FP8_TWICE, 0), (FP8_ONCE, 1), (INT8, 2), (NF4, 2), (NF4_IN_FP8, 1)):
        assert dequantised_bytes(LLAMA_8B, "cuda", "bf16", frozen) == wanted * widest
    assert sum(outputs * inputs for outputs, inputs in stack_shapes(LLAMA_8B)) * LLAMA_8B.layers == linear


def test_qlora_of_an_8b_base_fits_into_10_gb() -> None:
    plan = large("precision.base=nf4", "data.max_tokens=512", machine=of(H100, 10))
    assert plan.estimate.memory_bytes < 9 * GB


def test_recipes_of_one_run_share_the_format() -> None:
    with pytest.raises(PlanError) as caught:
        combine([plan_of(file="a.yaml"), plan_of("precision.base=nf4", file="b.yaml")])
    assert caught.value.code == "plan-combine" and "precision.base" in caught.value.what
    once = plan_of("precision.base=fp8", file="a.yaml", machine=H100).model_copy(update={"fp8_twice": False})
    assert not combine([once, plan_of("precision.base=fp8", file="b.yaml", machine=H100)]).fp8_twice


@pytest.mark.parametrize(
    ("machine", "facts", "frozen"),
    [
        (CPU, LLAMA_8B, DENSE),
        (CPU, STORED, DENSE),
        (of(H100, 80), STORED, DENSE),
        (of(H100, 16), LLAMA_8B, FP8_ONCE),
        (of(A100, 16), LLAMA_8B, INT8),
        (of(H100, 8), LLAMA_8B, NF4_IN_FP8),
        (of(T4, 8), LLAMA_8B, NF4),
    ],
)
def test_a_base_that_only_answers(machine: MachineFacts, facts: ModelFacts, frozen: Frozen) -> None:
    assert resident_format(facts, machine, "bf16" if machine.bf16 else "fp16") == frozen


def test_the_summary_says_it() -> None:
    shown = {row.what: row.value for row in plan_rows(plan_of("precision.base=nf4", machine=H100))}
    assert shown["precision"] == "bf16, the base in nf4"
    assert {row.what: row.value for row in plan_rows(plan_of(machine=CPU))}["precision"] == "fp32"


def test_qlora_as_axolotl_writes_it() -> None:
    plan = plan_of(text=SMALL + "adapter: qlora\nload_in_4bit: true\n", machine=H100)
    assert plan.frozen == NF4_IN_FP8
    assert choice(plan, "precision.base").reason.startswith("my.yaml:3, as adapter")
