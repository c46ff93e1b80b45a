"""What to install or change on a machine, from what was found there: pure rules, each with what to type.

This module asks nothing itself, and does not know screens.
"""

from __future__ import annotations

from collections.abc import Iterator

from tenon.errors import TenonError
from tenon.plan.driver import driver_problem
from tenon.runs.machine import GpuRecord, MachineRecord
from tenon.service.disk import DiskSpeed
from tenon.service.network import Link
from tenon.units import format_bytes
from tenon.values import Value

LITTLE_DISK_BYTES = 20_000_000_000
SLOW_DISK_BYTES_PER_SECOND = 100_000_000
_BF16, _FP8 = (8, 0), (8, 9)


class Advice(Value):
    """One thing to do. what: the finding; do: what to type or change; blocks: training cannot work until it is done."""

    what: str
    do: str
    blocks: bool = False


def advise(
    machine: MachineRecord,
    *,
    disk: DiskSpeed,
    hub: Link | None,
    problem: TenonError | None,
    compiler: bool,
) -> tuple[Advice, ...]:
    """What to do here, the urgent first. problem: what kept the checks from running; compiler: there is one for C."""
    found = [*_of_installation(machine, problem, compiler=compiler), *_of_gpus(machine), *_of_surroundings(disk, hub)]
    return tuple(sorted(found, key=lambda one: not one.blocks))


def _of_installation(machine: MachineRecord, problem: TenonError | None, *, compiler: bool) -> Iterator[Advice]:
    if problem is not None:
        got = f" ({problem.got})" if problem.got else ""
        yield Advice(what=f"{problem.what}{got}", do=problem.hint, blocks=True)
    driver = driver_problem(machine.driver, machine.driver_cuda, machine.torch_cuda)
    if driver is not None:
        yield Advice(what=driver.what, do=driver.hint, blocks=True)
    if machine.gpus and "torch" in machine.packages and not machine.torch_cuda and problem is None:
        major = machine.driver_cuda.partition(".")[0]
        yield Advice(
            what=f"there is a GPU ({machine.gpus[0].name}), and this torch was built for CPUs",
            do=f"install the torch build for CUDA {major}.x: pytorch.org, Get Started",
        )
    if machine.gpus and machine.torch_cuda and "triton" not in machine.packages:
        yield Advice(what="Triton is not installed, so no fused kernel can run", do="pip install triton")
    elif machine.gpus and machine.torch_cuda and not compiler:
        yield Advice(
            what="there is no C compiler, which Triton needs to start its kernels",
            do="install one: apt install gcc, or dnf install gcc",
        )
    if "nvidia-ml-py" not in machine.packages and problem is None:
        yield Advice(what="nvidia-ml-py is missing: no GPU can be watched", do="pip install 'tenonlm[train]'")


def _of_gpus(machine: MachineRecord) -> Iterator[Advice]:
    for gpu in machine.gpus:
        capability = _capability(gpu)
        if capability == (0, 0) or capability >= _FP8:
            continue
        name = f"GPU {gpu.index} ({gpu.name}, capability {gpu.capability})"
        if capability < _BF16:
            yield Advice(what=f"{name} has no bf16", do="nothing: the plan takes fp16 or fp32 there")
        else:
            yield Advice(what=f"{name} has no fp8", do="nothing: the plan takes another precision for the base there")


def _of_surroundings(disk: DiskSpeed, hub: Link | None) -> Iterator[Advice]:
    if disk.free_bytes < LITTLE_DISK_BYTES:
        yield Advice(
            what=f"{disk.folder} has only {format_bytes(disk.free_bytes)} free",
            do="free some space, or set TENON_HOME or TENON_CACHE to another disk",
        )
    slow = min(disk.write_bytes_per_second or 0.0, disk.read_bytes_per_second or 0.0)
    if 0 < slow < SLOW_DISK_BYTES_PER_SECOND:
        yield Advice(
            what=f"the disk of {disk.folder} is slow ({format_bytes(slow)}/s): loading a base will take long",
            do="set TENON_CACHE to a local disk",
        )
    if hub is not None and hub.problem:
        yield Advice(
            what=f"the hub does not answer ({hub.problem})",
            do="set TENON_OFFLINE=1 and name bases by their folder; or set the proxy in https_proxy",
        )


def _capability(gpu: GpuRecord) -> tuple[int, int]:
    major, _, minor = gpu.capability.partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)
