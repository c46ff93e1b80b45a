"""Several recipes over one base become one run; what cannot be shared is refused."""

from __future__ import annotations

import pytest

from tenon.errors import PlanError
from tenon.plan.combine import combine
from tenon.plan.values import Plan

from .situations import CPU, GB, H100, LLAMA_8B, plan_of


def test_slots_side_by_side() -> None:
    a = plan_of("lora.rank=8", "checkpoint.every=5", "trackers=[wandb]", file="a.yaml")
    b = plan_of("lora.targets=qv", "lora.dropout=0.1", "checkpoint.keep=4", "trackers=[mlflow]", file="b.yaml")
    plan = combine([a, b])
    assert [slot.name for slot in plan.slots] == ["a", "b"]
    assert plan.slots == (*a.slots, *b.slots)
    assert (plan.checkpoint.every, plan.checkpoint.keep) == (5, 4)
    assert plan.trackers == ("wandb", "mlflow")
    assert not plan.share_prefix
    assert plan.run_folder == "/work/runs/a+b"
    assert plan.estimate.trainable_parameters == a.estimate.trainable_parameters + b.estimate.trainable_parameters
    assert plan.estimate.memory_bytes < a.estimate.memory_bytes + b.estimate.memory_bytes
    assert {choice.key for choice in plan.choices} >= {"a:lora.rank", "b:lora.rank"}
    assert Plan.from_json(plan.to_json()) == plan


def test_one_plan_stays_itself() -> None:
    plan = plan_of()
    assert combine([plan]) is plan


def test_the_longest_row_of_any_slot_fits() -> None:
    a = plan_of("data.max_tokens=4000", file="a.yaml")
    b = plan_of("data.max_tokens=100", "batch.micro_tokens=500", file="b.yaml")
    assert combine([a, b]).keeping.micro_tokens == 4000


@pytest.mark.parametrize(
    "other",
    [
        plan_of(file="b.yaml").model_copy(update={"base": plan_of().base.model_copy(update={"base_hash": "1" * 64})}),
        plan_of("precision=bf16", file="b.yaml"),
        plan_of(file="b.yaml", machine=H100),
        plan_of(file="a.yaml"),
    ],
    ids=["base", "precision", "device", "name"],
)
def test_what_cannot_be_shared(other: Plan) -> None:
    with pytest.raises(PlanError) as caught:
        combine([plan_of(file="a.yaml"), other])
    assert caught.value.code == "plan-combine"


def test_p28_adapters_that_fit_alone_but_not_together() -> None:
    machine = H100.model_copy(update={"device_memory_bytes": 34 * GB})
    plans = [
        plan_of("lora.rank=256", "batch.micro_tokens=2048", facts=LLAMA_8B, machine=machine, file=f"{name}.yaml")
        for name in "abc"
    ]
    with pytest.raises(PlanError) as caught:
        combine(plans)
    assert caught.value.code == "plan-memory"


def test_room_for_all_checkpoints() -> None:
    machine = CPU.model_copy(update={"free_disk_bytes": 300_000_000})
    with pytest.raises(PlanError, match="plan-disk"):
        combine([plan_of(file="a.yaml", machine=machine), plan_of(file="b.yaml", machine=machine)])


def test_the_run_folder_is_the_one_that_all_ask_for() -> None:
    asked = combine([plan_of("run=/runs/both", file="a.yaml"), plan_of("run=/runs/both", file="b.yaml")])
    assert asked.run_folder == "/runs/both"
    named = combine([plan_of(file="a.yaml"), plan_of(file="b.yaml")])
    assert named.run_folder.endswith("/a+b")
