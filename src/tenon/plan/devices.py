"""How many devices share a run's steps, and whether each holds the whole base: estimates, and a reason for the choice.

Replicas are taken where the base fits one device: they exchange the adapters' gradients once a step. Where it does not,
each device keeps a part of every layer, and whole layers come to all of them twice for each batch. Pure: this module
knows no tensors and starts nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tenon.bases.facts import ModelFacts
from tenon.errors import PlanError
from tenon.plan.choices import Choices
from tenon.plan.memory import USABLE_SHARE, base_bytes, layer_bytes
from tenon.plan.time import STEP_OVERHEAD_SECONDS, device_rate
from tenon.plan.values import DevicesPlan, Frozen, MachineFacts, Plan, Precision
from tenon.recipe.load import Loaded
from tenon.units import format_bytes, format_seconds

# A GPU more is taken as long as all of them are computing at least for this share of a step.
USEFUL_SHARE = 0.6
# A further GPU with less of the first one's free memory than this is in somebody's use.
FREE_SHARE = 0.9
# Bytes a second that each GPU sends and gets among all: NVLink of these, PCI Express of others. First match decides.
LINK_RATES: tuple[tuple[str, float], ...] = (
    ("HBM3", 200e9),
    ("SXM", 200e9),
    ("H200", 200e9),
    ("B200", 400e9),
    ("NVL", 200e9),
)
SLOW_LINK_RATE = 15e9
# What ranks take to agree, several times a step.
AGREE_SECONDS = 0.002


@dataclass(frozen=True, slots=True)
class StepFacts:
    """One optimiser step, whoever computes it. rows: of its window. batch_tokens: computed at once by one device."""

    rows: float
    tokens: float
    token_flops: float
    gradient_bytes: int
    batch_tokens: float


def candidate_counts(loaded: Loaded, machine: MachineFacts) -> tuple[int, ...]:
    """Numbers of devices that the run may use, ascending; one number when the recipe says it.

    Raises PlanError plan-devices.
    """
    asked = loaded.recipe.devices
    if asked is None or asked == "auto":
        return tuple(range(1, free_gpus(machine) + 1))
    if machine.device == "cuda" and asked > 1 + len(machine.peers_memory_bytes):
        there = 1 + len(machine.peers_memory_bytes)
        raise PlanError(
            "plan-devices",
            f"devices is {asked}, and this machine has {there} of the kind {machine.device_name}",
            got=str(asked),
            hint=f"set devices: {there}, or auto; CUDA_VISIBLE_DEVICES says which GPUs may be used",
        )
    return (asked,)


def free_gpus(machine: MachineFacts) -> int:
    """GPUs of one kind, from the first on, that nobody else uses."""
    count = 1
    for memory_bytes in machine.peers_memory_bytes:
        if memory_bytes < FREE_SHARE * machine.device_memory_bytes:
            break
        count += 1
    return count


def rank_machine(machine: MachineFacts, count: int) -> MachineFacts:
    """What one of `count` devices has to itself: the least memory of these GPUs, or its part of a CPU."""
    if count == 1:
        return machine
    if machine.device == "cpu":
        part = {"host_memory_bytes": machine.host_memory_bytes // count, "threads": max(1, machine.threads // count)}
        return machine.model_copy(update=part)
    memory_bytes = min(machine.device_memory_bytes, *machine.peers_memory_bytes[: count - 1])
    return machine.model_copy(update={"device_memory_bytes": memory_bytes})


def step_seconds(
    devices: DevicesPlan,
    step: StepFacts,
    facts: ModelFacts,
    machine: MachineFacts,
    *,
    precision: Precision,
    frozen: Frozen,
) -> float:
    """Seconds of a step on so many devices: the one with most rows, and what they send each other."""
    count = devices.count
    rate = device_rate(rank_machine(machine, count), precision, frozen)
    tokens = step.tokens * max(math.ceil(step.rows / count) / max(step.rows, 1.0), 1.0 / count)
    seconds = tokens * step.token_flops / rate
    if count == 1:
        return STEP_OVERHEAD_SECONDS[machine.device] + seconds
    link = next((rate for name, rate in LINK_RATES if name in machine.device_name), SLOW_LINK_RATE)
    part = (count - 1) / count
    seconds += 2 * part * step.gradient_bytes / link + AGREE_SECONDS
    if devices.sharded:
        gathered = 2 * part * facts.layers * layer_bytes(facts, precision, frozen)
        # Layers come while others are computed with: the slower of the two counts.
        seconds = max(seconds, math.ceil(tokens / step.batch_tokens) * gathered / link)
    return STEP_OVERHEAD_SECONDS[machine.device] + seconds


def decide_devices(
    loaded: Loaded,
    choices: Choices,
    machine: MachineFacts,
    *,
    counts: tuple[int, ...],
    shards: int,
    step_rows: float,
    seconds: Callable[[DevicesPlan], float],
) -> DevicesPlan:
    """The number of devices, of `counts`, at least as many as the base is spread over.

    shards: 1 where one device holds it all. seconds: what a step takes. Raises PlanError plan-devices for more replicas
    than a step has rows.
    """

    def on(count: int) -> DevicesPlan:
        return DevicesPlan(count=count, sharded=shards > 1)

    asked = loaded.recipe.devices
    if isinstance(asked, int):
        if shards == 1 and asked > max(1.0, step_rows):
            raise PlanError(
                "plan-devices",
                f"devices is {asked}, and a step has {math.floor(step_rows)} rows: some would have nothing to do",
                got=str(asked),
                hint=f"raise batch.rows to {asked} or more, or lower devices",
            )
        choices.said("devices", asked, _how_held(on(asked)) if asked > 1 else "")
        return on(asked)
    least = shards * seconds(on(shards))
    useful = [n for n in counts if n >= shards and (n == shards or least / (n * seconds(on(n))) >= USEFUL_SHARE)]
    count = max(useful, default=shards)
    if count < max(counts):
        times = [f"about {format_seconds(seconds(on(n)))}" for n in (max(counts), count)]
        choices.reject(f"{max(counts)} GPUs", f"a step takes {times[0]} on them, and {times[1]} on {count}")
    choices.derived("devices", None, count, _reason(on(count), machine, seconds))
    return on(count)


def _reason(devices: DevicesPlan, machine: MachineFacts, seconds: Callable[[DevicesPlan], float]) -> str:
    if machine.device == "cpu":
        return "a CPU computes in one process"
    if devices.count == 1:
        gpus = 1 + len(machine.peers_memory_bytes)
        busy = f"; of {gpus} GPUs the others are in use" if 1 == free_gpus(machine) < gpus else ""
        return f"the one GPU that is here{busy}" if free_gpus(machine) == 1 else "enough for steps of this size"
    if devices.sharded:
        return f"one GPU cannot hold the base: {_how_held(devices)}"
    alone = format_seconds(seconds(DevicesPlan()))
    return f"{_how_held(devices)}; a step takes about {format_seconds(seconds(devices))} instead of {alone}"


def _how_held(devices: DevicesPlan) -> str:
    if devices.sharded:
        return f"each keeps 1/{devices.count} of every layer"
    return "each has the whole base, and computes a part of every step"


def respread(plan: Plan, count: int, machine: MachineFacts) -> Plan:
    """The plan on another number of devices, of another machine perhaps: the same rows in the same order.

    Raises PlanError plan-devices, plan-memory.
    """
    if plan.machine.device == "cuda" and (machine.device != "cuda" or count > 1 + len(machine.peers_memory_bytes)):
        here = 1 + len(machine.peers_memory_bytes) if machine.device == "cuda" else 0
        raise PlanError(
            "plan-devices",
            f"the run is to use {count} GPU{'s' if count > 1 else ''}, and this machine has {here} of one kind",
            got=str(count),
            hint=f"tenon resume RUN --devices {here}" if here else "resume it on a machine with a GPU",
        )
    sharded = plan.devices.sharded and count > 1
    before, after = (
        base_bytes(plan.base.facts, plan.precision, plan.frozen, n)
        for n in (plan.devices.count if plan.devices.sharded else 1, count if sharded else 1)
    )
    need_bytes = plan.estimate.memory_bytes - before + after
    usable = round(rank_machine(machine, count).device_memory_bytes * USABLE_SHARE)
    if plan.devices.sharded and need_bytes > usable:
        raise PlanError(
            "plan-memory",
            f"on {count} GPU{'s' if count > 1 else ''} each needs about {format_bytes(need_bytes)}, and "
            f"{format_bytes(usable)} may be used",
            hint=f"resume it on more GPUs: tenon resume RUN --devices {plan.devices.count}",
        )
    estimate = plan.estimate.model_copy(update={"memory_bytes": need_bytes})
    return plan.model_copy(update={"devices": DevicesPlan(count=count, sharded=sharded), "estimate": estimate})
