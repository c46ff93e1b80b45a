"""What this machine offers, without importing torch: cores and memory within the limits of cgroups, GPUs, free disk.

Every place that is asked (files of the kernel, `nvidia-smi`, installed packages) comes in as a `Probe`, so that tests
give their own. This module does not know what a run needs.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tenon.plan.values import MachineFacts
from tenon.runs.nvml import visible_places
from tenon.runs.space import free_bytes
from tenon.settings import Settings

NVIDIA_QUERY = (
    "nvidia-smi",
    "--query-gpu=index,uuid,name,memory.free,compute_cap",
    "--format=csv,noheader,nounits",
)
QUERY_SECONDS = 10.0
# bf16 arithmetic exists from compute capability 8.0 (Ampere) on.
BF16_CAPABILITY = (8, 0)
UNKNOWN_MEMORY_BYTES = 4_000_000_000


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as nvidia-smi lists it. free_bytes: what may be used, not what is installed."""

    index: int
    uuid: str
    name: str
    free_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Probe:
    """Where facts come from.

    root: of the kernel's files. cores: that this process may run on. query: runs a command, None when it is missing or
    fails. torch_version: of the installed torch, "" without one.
    """

    root: Path
    cores: int
    query: Callable[[tuple[str, ...]], str | None]
    torch_version: str


def this_machine() -> Probe:
    """The probe of the machine that this process runs on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return Probe(root=Path("/"), cores=cores, query=_run, torch_version=_torch_version())


def read_machine(settings: Settings, *, run_folder: Path, probe: Probe | None = None) -> MachineFacts:
    """The facts of a machine. run_folder: where the run will write, for the free disk; it need not exist."""
    probe = probe or this_machine()
    cores = max(1, min(probe.cores, _cgroup_cores(probe.root) or probe.cores))
    host_bytes = _host_memory(probe.root)
    found = _gpus(probe)
    gpus = [found[at] for at in visible_places([(gpu.index, gpu.uuid) for gpu in found], settings.visible_devices)]
    gpu = gpus[0] if gpus else None
    return MachineFacts(
        device="cuda" if gpu else "cpu",
        device_name=gpu.name if gpu else _cpu_name(probe.root),
        device_count=len(gpus) or 1,
        device_memory_bytes=gpu.free_bytes if gpu else host_bytes,
        host_memory_bytes=host_bytes,
        cores=cores,
        threads=settings.threads or cores,
        bf16=gpu.capability >= BF16_CAPABILITY if gpu else False,
        free_disk_bytes=free_bytes(run_folder),
        capability=gpu.capability if gpu else None,
        peers_memory_bytes=_peers(gpus),
    )


def parse_gpus(text: str) -> list[Gpu]:
    """The GPUs of nvidia-smi's answer; a line that says something else (`[N/A]`, an error) is no GPU."""
    gpus = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 5 or not cells[0].isdigit() or not cells[3].isdigit():
            continue
        capability = re.fullmatch(r"(\d+)\.(\d+)", cells[4])
        if capability is None:
            continue
        gpus.append(
            Gpu(
                index=int(cells[0]),
                uuid=cells[1],
                name=cells[2],
                free_bytes=int(cells[3]) * 1024 * 1024,
                capability=(int(capability[1]), int(capability[2])),
            )
        )
    return gpus


def _peers(gpus: list[Gpu]) -> tuple[int, ...]:
    """Free memory of the GPUs that follow the first, up to one of another kind: ranks take them in this order."""
    alike = itertools.takewhile(lambda gpu: (gpu.name, gpu.capability) == (gpus[0].name, gpus[0].capability), gpus[1:])
    return tuple(gpu.free_bytes for gpu in alike)


def _gpus(probe: Probe) -> list[Gpu]:
    """No GPU counts where the installed torch was built for the CPU alone."""
    if "+cpu" in probe.torch_version:
        return []
    answer = probe.query(NVIDIA_QUERY)
    return parse_gpus(answer) if answer else []


def _run(command: tuple[str, ...]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _torch_version() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _read(path: Path) -> str:
    """A file of the kernel, or "" where this kernel has none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _host_memory(root: Path) -> int:
    """What may still be used: the smaller of what the machine has available and what the cgroup leaves."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    available = int(found[1]) * 1024 if found else _physical_memory()
    limits = [available]
    for limit, used, cache in (
        ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current", "inactive_file"),
        (
            "sys/fs/cgroup/memory/memory.limit_in_bytes",
            "sys/fs/cgroup/memory/memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ):
        words = _read(root / limit), _read(root / used)
        if all(word.isdigit() for word in words):
            # File cache counts as used there, but is given back on demand.
            statistics = _read((root / limit).parent / "memory.stat")
            cached = re.search(rf"^{cache} (\d+)$", statistics, re.MULTILINE)
            limits.append(int(words[0]) - int(words[1]) + (int(cached[1]) if cached else 0))
    return max(0, min(limits))


def _physical_memory() -> int:
    names = os.sysconf_names
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return UNKNOWN_MEMORY_BYTES
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_cores(root: Path) -> int:
    """Whole cores of a cgroup's CPU quota, at least one; 0 without a quota."""
    words = _read(root / "sys/fs/cgroup/cpu.max").split()
    if len(words) != 2:
        words = [_read(root / f"sys/fs/cgroup/cpu/cpu.cfs_{name}_us") for name in ("quota", "period")]
    if not all(word.isdigit() for word in words) or int(words[1]) == 0:
        return 0
    return max(1, int(words[0]) // int(words[1]))


def _cpu_name(root: Path) -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else (platform.processor() or platform.machine() or "CPU")
