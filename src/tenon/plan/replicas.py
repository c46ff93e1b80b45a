"""How many engines a server has, and where each computes: a GPU of its own, or its part of a CPU's threads.

Pure: this module knows no tensors and starts nothing.
"""

from __future__ import annotations

import re

from tenon.errors import PlanError, UsageError
from tenon.plan.devices import free_gpus
from tenon.plan.requests import Engine, Replicas, Seat
from tenon.plan.values import MachineFacts


def plan_replicas(
    text: str,
    engine: Engine,
    *,
    visible_devices: str | None,
    queue_delay_seconds: float,
    silence_seconds: float,
) -> Replicas | None:
    """The engines of a server; None for one in the server's own process.

    text: `3`, `1-4`, `auto` or `0` (as many as there are GPUs that nobody uses). engine: as planned for one.
    visible_devices: the GPUs that may be used, as CUDA reads them. Whether each has room is `plan.serving`'s to say.
    Raises UsageError usage-replicas, PlanError plan-replicas.
    """
    machine = engine.machine
    least, most = _range(text, machine)
    if most == 1:
        return None
    _require_places(machine, most)
    return Replicas(
        seats=tuple(_seat(machine, number, most, visible_devices) for number in range(most)),
        least=least,
        up_delay_seconds=queue_delay_seconds,
        silence_seconds=silence_seconds,
    )


def _range(text: str, machine: MachineFacts) -> tuple[int, int]:
    if text in ("auto", "0"):
        count = free_gpus(machine) if machine.device == "cuda" else 1
        return count, count
    found = re.fullmatch(r"(\d{1,3})(?:-(\d{1,3}))?", text)
    least, most = (0, 0) if found is None else (int(found[1]), int(found[2] or found[1]))
    if not 1 <= least <= most:
        raise UsageError(
            "usage-replicas",
            "--replicas is neither a number, nor a range, nor auto",
            got=text,
            hint="type --replicas 2, --replicas 1-4 or --replicas auto",
        )
    return least, most


def _seat(machine: MachineFacts, number: int, count: int, visible_devices: str | None) -> Seat:
    if machine.device == "cpu":
        part = {"host_memory_bytes": machine.host_memory_bytes // count, "threads": max(1, machine.threads // count)}
        return Seat(machine=machine.model_copy(update=part))
    memory_bytes = (machine.device_memory_bytes, *machine.peers_memory_bytes)[number]
    alone = {"device_memory_bytes": memory_bytes, "device_count": 1, "peers_memory_bytes": ()}
    place = str(number) if visible_devices is None else visible_devices.split(",")[number].strip()
    return Seat(machine=machine.model_copy(update=alone), visible_devices=place)


def _require_places(machine: MachineFacts, count: int) -> None:
    """Raises PlanError plan-replicas."""
    if machine.device == "cuda":
        there = 1 + len(machine.peers_memory_bytes)
        if count > there:
            raise PlanError(
                "plan-replicas",
                f"{count} replicas want a GPU each, and this machine has {there} of the kind {machine.device_name}",
                hint=f"type --replicas {there}, or auto; CUDA_VISIBLE_DEVICES says which GPUs may be used",
            )
        return
    if count > machine.threads:
        raise PlanError(
            "plan-replicas",
            f"{count} replicas want a thread each, and there are {machine.threads}",
            hint=f"type --replicas {machine.threads} at the most; TENON_THREADS says how many threads may be used",
        )
