"""What is advised for which machine."""

from __future__ import annotations

import pytest

from tenon.errors import UsageError
from tenon.runs.machine import GpuRecord, MachineRecord
from tenon.service.advice import advise
from tenon.service.disk import DiskSpeed
from tenon.service.network import Link

H100 = GpuRecord(index=0, name="NVIDIA H100", capability="9.0", total_bytes=80 * 10**9, free_bytes=79 * 10**9)
GOOD = MachineRecord(
    python="3.12.1", system="Linux", cores=16, torch_cuda="13.0", driver="580.65.06", driver_cuda="13.0", gpus=(H100,),
    packages={"torch": "2.13.0", "triton": "3.6.0", "transformers": "5.17.0", "nvidia-ml-py": "13.580"},
)  # fmt: skip
DISK = DiskSpeed(
    folder="/home/me/.tenon/cache", free_bytes=10**12, write_bytes_per_second=1e9, read_bytes_per_second=2e9
)


def advised(
    machine: MachineRecord = GOOD,
    *,
    disk: DiskSpeed = DISK,
    hub: Link | None = None,
    problem: UsageError | None = None,
    compiler: bool = True,
) -> list[tuple[str, str, bool]]:
    found = advise(machine, disk=disk, hub=hub, problem=problem, compiler=compiler)
    return [(one.what, one.do, one.blocks) for one in found]


def but(**changes: object) -> MachineRecord:
    return GOOD.model_copy(update=changes)


def without(package: str) -> dict[str, str]:
    return {name: version for name, version in GOOD.packages.items() if name != package}


def test_a_good_machine_needs_nothing() -> None:
    assert advised() == []
    assert advised(hub=Link(target="https://hub", seconds=0.1)) == []


def test_a_machine_without_a_gpu_needs_nothing() -> None:
    cpu = but(gpus=(), driver="", driver_cuda="", torch_cuda="", no_gpu="NVML Shared Library Not Found")
    assert advised(cpu, compiler=False) == []


def test_missing_packages_come_first_and_block() -> None:
    missing = UsageError(
        "usage-extra-missing", "packages are missing", got="no torch", hint="pip install 'tenonlm[train]'"
    )
    found = advised(
        but(packages={}, torch_cuda=""), problem=missing, disk=DISK.model_copy(update={"free_bytes": 10**9})
    )
    assert found[0] == ("packages are missing (no torch)", "pip install 'tenonlm[train]'", True)
    assert len(found) == 2 and "only 1.0 GB free" in found[1][0]


def test_a_driver_that_is_too_old_blocks() -> None:
    ((what, do, blocks),) = advised(but(driver="535.104.05", driver_cuda="12.2"))
    assert blocks and "535.104.05" in what and "580.65.06" in do


@pytest.mark.parametrize(
    ("machine", "compiler", "what", "do"),
    [
        (but(torch_cuda=""), True, "built for CPUs", "torch build for CUDA 13.x"),
        (but(packages=without("triton")), True, "Triton is not installed", "pip install triton"),
        (GOOD, False, "no C compiler", "apt install gcc"),
        (but(packages=without("nvidia-ml-py")), True, "nvidia-ml-py is missing", "tenonlm[train]"),
        (but(gpus=(H100.model_copy(update={"capability": "8.0"}),)), True, "has no fp8", "another precision"),
        (but(gpus=(H100.model_copy(update={"capability": "7.5"}),)), True, "has no bf16", "fp16"),
    ],
)
def test_what_works_less_well_is_advised(machine: MachineRecord, compiler: bool, what: str, do: str) -> None:
    ((said, to_do, blocks),) = advised(machine, compiler=compiler)
    assert what in said and do in to_do and not blocks


def test_a_gpu_that_does_not_tell_its_capability_is_left_alone() -> None:
    assert advised(but(gpus=(H100.model_copy(update={"capability": ""}),))) == []


def test_disk_and_hub() -> None:
    slow = DISK.model_copy(update={"read_bytes_per_second": 3e7})
    ((what, do, _),) = advised(disk=slow)
    assert "slow (30.0 MB/s)" in what and "TENON_CACHE" in do
    ((what, do, _),) = advised(hub=Link(target="https://hub", problem="timed out"))
    assert "timed out" in what and "TENON_OFFLINE=1" in do
