"""How many devices a run takes, whether each holds the whole base, why, and what is refused."""

from __future__ import annotations

import pytest

from tenon.errors import PlanError
from tenon.plan.combine import combine
from tenon.plan.devices import StepFacts, free_gpus, rank_machine, respread, step_seconds
from tenon.plan.explain import plan_rows
from tenon.plan.memory import base_bytes, layer_bytes
from tenon.plan.size import DataSize
from tenon.plan.values import DevicesPlan, Frozen, MachineFacts, Plan
from tests.plan.situations import CPU, GB, H100, LLAMA_8B, T4, choice, plan_of

LONG = DataSize(rows=20_000, mean_tokens=1_500.0, longest_tokens=2_000, exact=True)
QWEN_32B = LLAMA_8B.model_copy(
    update={
        "layers": 64,
        "hidden": 5120,
        "heads": 40,
        "feed_forward": 27_648,
        "vocab": 152_064,
        "rotary_layers": (True,) * 64,
        "window_layers": (0,) * 64,
    }
)
DENSE = Frozen()
# Too small for the 65 GB of the 32B base in bf16, large enough for half of it.
SMALLER = H100.model_copy(update={"device_memory_bytes": 64 * GB})


def several(count: int, machine: MachineFacts = H100, *, free: float = 1.0) -> MachineFacts:
    """As many GPUs of the kind; each but the first has this share of the first one's free memory."""
    peers = (round(free * machine.device_memory_bytes),) * (count - 1)
    return machine.model_copy(update={"device_count": count, "peers_memory_bytes": peers})


def rejected(plan: Plan) -> dict[str, str]:
    return {one.what: one.reason for one in plan.rejected}


def test_long_steps_take_every_free_gpu() -> None:
    plan = plan_of(facts=LLAMA_8B, machine=several(4), size=LONG)
    assert plan.devices == DevicesPlan(count=4)
    told = choice(plan, "devices")
    assert (told.value, told.origin) == ("4", "derived")
    assert told.reason.startswith("each has the whole base, and computes a part of every step; a step takes about")
    one = plan_of("devices=1", facts=LLAMA_8B, machine=several(4), size=LONG)
    assert 3.0 < one.estimate.seconds / plan.estimate.seconds < 4.0
    assert one.estimate.steps == plan.estimate.steps


def test_short_steps_stay_on_one_gpu_and_the_plan_says_why() -> None:
    plan = plan_of(machine=several(2))
    assert plan.devices == DevicesPlan()
    assert choice(plan, "devices").reason == "enough for steps of this size"
    assert rejected(plan)["2 GPUs"].startswith("a step takes about")


def test_gpus_in_use_by_others_are_left_alone() -> None:
    plan = plan_of(facts=LLAMA_8B, machine=several(2, free=0.4), size=LONG)
    assert plan.devices == DevicesPlan()
    assert choice(plan, "devices").reason == "the one GPU that is here; of 2 GPUs the others are in use"
    asked = plan_of("devices=2", facts=LLAMA_8B, machine=several(2, free=0.4), size=LONG)
    assert asked.devices.count == 2
    assert asked.machine.device_memory_bytes == round(0.4 * H100.device_memory_bytes)


def test_a_base_that_one_gpu_cannot_hold_is_spread() -> None:
    plan = plan_of(facts=QWEN_32B, machine=several(2, SMALLER), size=LONG)
    assert plan.devices == DevicesPlan(count=2, sharded=True)
    assert plan.frozen == DENSE
    assert choice(plan, "devices").reason == "one GPU cannot hold the base: each keeps 1/2 of every layer"
    assert "each needs about" in rejected(plan)["the whole base on each device"]
    part = base_bytes(QWEN_32B, "bf16", DENSE, 2)
    assert part < plan.estimate.memory_bytes < 0.9 * SMALLER.device_memory_bytes


def test_on_one_gpu_the_same_base_is_quantised_instead() -> None:
    plan = plan_of(facts=QWEN_32B, size=LONG, machine=SMALLER)
    assert plan.devices == DevicesPlan()
    assert plan.base_format == "fp8"


def test_quantised_on_request_it_is_whole_on_each_gpu() -> None:
    plan = plan_of("precision.base=nf4", facts=QWEN_32B, machine=several(2, SMALLER), size=LONG)
    assert plan.devices == DevicesPlan(count=2)


def test_as_few_gpus_as_hold_it_where_steps_are_short() -> None:
    short = DataSize(rows=1_000, mean_tokens=20.0, longest_tokens=40, exact=True)
    plan = plan_of("batch.rows=2", facts=QWEN_32B, machine=several(8, SMALLER), size=short)
    assert plan.devices.sharded and plan.devices.count == 2


def test_what_would_fit_names_gpus() -> None:
    huge = QWEN_32B.model_copy(update={"layers": 640, "rotary_layers": (True,) * 640, "window_layers": (0,) * 640})
    with pytest.raises(PlanError) as error:
        plan_of("precision.base=same", facts=huge, machine=several(2), size=LONG)
    assert error.value.code == "plan-memory"
    assert "such GPUs" in error.value.hint


@pytest.mark.parametrize(("count", "machine", "words"), [(3, several(2), "has 2 of the kind"), (2, T4, "has 1 of")])
def test_more_gpus_than_there_are(count: int, machine: MachineFacts, words: str) -> None:
    with pytest.raises(PlanError) as error:
        plan_of(f"devices={count}", machine=machine)
    assert error.value.code == "plan-devices"
    assert words in error.value.what


def test_more_replicas_than_rows() -> None:
    with pytest.raises(PlanError, match="some would have nothing to do") as error:
        plan_of("devices=4", "batch.rows=2", machine=several(4))
    assert error.value.code == "plan-devices"


def test_a_cpu_is_one_process_unless_asked() -> None:
    assert plan_of().devices == DevicesPlan()
    assert choice(plan_of(), "devices").reason == "a CPU computes in one process"
    plan = plan_of("devices=2")
    assert plan.devices == DevicesPlan(count=2)
    assert plan.machine == CPU
    assert rank_machine(CPU, 2).threads == 1


def test_the_summary_says_how_many_and_what_each_holds() -> None:
    def shown(plan: Plan) -> dict[str, str]:
        return {row.what: f"{row.value} {row.note}" for row in plan_rows(plan)}

    whole = shown(plan_of(facts=LLAMA_8B, machine=several(2), size=LONG))
    assert whole["device"].startswith("2 x cuda, a replica each")
    assert whole["memory"].endswith("on each device")
    spread = shown(plan_of(facts=QWEN_32B, machine=several(2, SMALLER), size=LONG))
    assert spread["device"].startswith("2 x cuda, the base spread over them")


def test_plans_that_train_together_take_the_most_of_each() -> None:
    machine = several(4)
    a = plan_of("name=a", "devices=2", facts=LLAMA_8B, machine=machine, size=LONG)
    b = plan_of("name=b", "devices=4", facts=LLAMA_8B, machine=machine, size=LONG)
    assert combine([a, b]).devices == DevicesPlan(count=4)


def test_free_gpus_are_those_in_a_row_from_the_first() -> None:
    peers = (80 * GB, 20 * GB, 80 * GB)
    assert free_gpus(H100.model_copy(update={"peers_memory_bytes": peers})) == 2
    assert free_gpus(H100) == 1


def test_memory_of_a_part_is_its_share_and_two_whole_layers() -> None:
    one, rest = layer_bytes(QWEN_32B, "bf16", DENSE), 2 * (QWEN_32B.parameters - QWEN_32B.linear_parameters)
    assert base_bytes(QWEN_32B, "bf16", DENSE, 1) == 64 * one + rest
    assert base_bytes(QWEN_32B, "bf16", DENSE, 4) == 16 * one + 2 * one + rest


def test_slow_links_show_in_the_time_of_a_spread_base() -> None:
    step = StepFacts(rows=8, tokens=16_384, token_flops=2e11, gradient_bytes=10**9, batch_tokens=8_192)
    pcie = several(2, H100.model_copy(update={"device_name": "NVIDIA RTX 4090"}))
    seconds = [
        step_seconds(DevicesPlan(count=2, sharded=True), step, QWEN_32B, m, precision="bf16", frozen=DENSE)
        for m in (several(2), pcie)
    ]
    whole = step_seconds(DevicesPlan(count=2), step, QWEN_32B, several(2), precision="bf16", frozen=DENSE)
    assert seconds[0] == pytest.approx(whole), "hidden behind the computation"
    assert seconds[1] > 1.5 * seconds[0]


def test_a_run_goes_on_with_another_number() -> None:
    plan = plan_of(facts=LLAMA_8B, machine=several(4), size=LONG)
    assert respread(plan, 2, several(2)).devices == DevicesPlan(count=2)
    assert respread(plan, 1, H100).devices == DevicesPlan()
    spread = plan_of(facts=QWEN_32B, machine=several(2, SMALLER), size=LONG)
    wider = respread(spread, 4, several(4, SMALLER))
    assert wider.devices == DevicesPlan(count=4, sharded=True)
    assert wider.estimate.memory_bytes < spread.estimate.memory_bytes


@pytest.mark.parametrize(
    ("count", "machine", "code", "hint"),
    [
        (1, SMALLER, "plan-memory", "--devices 2"),
        (4, several(2, SMALLER), "plan-devices", "--devices 2"),
        (1, CPU, "plan-devices", "a machine with a GPU"),
    ],
)
def test_where_a_run_cannot_go_on(count: int, machine: MachineFacts, code: str, hint: str) -> None:
    spread = plan_of(facts=QWEN_32B, machine=several(2, SMALLER), size=LONG)
    with pytest.raises(PlanError) as error:
        respread(spread, count, machine)
    assert error.value.code == code
    assert hint in error.value.hint
