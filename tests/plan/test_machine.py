"""The machine as the kernel, cgroups and nvidia-smi describe it; no torch is asked."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tenon.plan.machine import NVIDIA_QUERY, Probe, parse_gpus, read_machine, this_machine
from tenon.settings import Settings, read_settings

TWO_GPUS = "0, GPU-aaa, NVIDIA H100 80GB HBM3, 80994, 9.0\n1, GPU-bbb, Tesla T4, 15000, 7.5\n"
MEMINFO = "MemTotal:       32000000 kB\nMemFree:         1000000 kB\nMemAvailable:   20000000 kB\n"


def probe(
    tmp_path: Path, files: dict[str, str] | None = None, *, gpus: str | None = None, torch: str = "2.13.0"
) -> Probe:
    for name, text in {"proc/meminfo": MEMINFO, **(files or {})}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return Probe(root=tmp_path, cores=8, query=lambda command: gpus, torch_version=torch)


def test_a_machine_without_a_gpu(tmp_path: Path, settings: Settings) -> None:
    files = {"proc/cpuinfo": "processor : 0\nmodel name\t: Some CPU @ 3 GHz\n"}
    facts = read_machine(
        replace(settings, threads=0), run_folder=tmp_path / "not" / "yet", probe=probe(tmp_path, files)
    )
    assert (facts.device, facts.device_name, facts.device_count) == ("cpu", "Some CPU @ 3 GHz", 1)
    assert facts.host_memory_bytes == facts.device_memory_bytes == 20_000_000 * 1024
    assert (facts.cores, facts.threads, facts.bf16) == (8, 8, False)
    assert facts.free_disk_bytes > 0


def test_threads_come_from_the_settings(tmp_path: Path, settings: Settings) -> None:
    facts = read_machine(replace(settings, threads=3), run_folder=tmp_path, probe=probe(tmp_path))
    assert (facts.cores, facts.threads) == (8, 3)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"sys/fs/cgroup/cpu.max": "250000 100000"}, 2),
        ({"sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        ({"sys/fs/cgroup/cpu.max": "max 100000"}, 8),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 4),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"sys/fs/cgroup/cpu.max": "6400000 100000"}, 8),
    ],
)
def test_cpu_quotas(tmp_path: Path, settings: Settings, files: dict[str, str], cores: int) -> None:
    assert read_machine(settings, run_folder=tmp_path, probe=probe(tmp_path, files)).cores == cores


@pytest.mark.parametrize(
    ("files", "expected_bytes"),
    [
        ({"sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/memory.current": "5"}, 20_000_000 * 1024),
        ({"sys/fs/cgroup/memory.max": "4000000000", "sys/fs/cgroup/memory.current": "1000000000"}, 3_000_000_000),
        (
            {
                "sys/fs/cgroup/memory.max": "4000000000",
                "sys/fs/cgroup/memory.current": "1000000000",
                "sys/fs/cgroup/memory.stat": "anon 1\ninactive_file 400000000\n",
            },
            3_400_000_000,
        ),
        (
            {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000000000",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "500000000",
            },
            1_500_000_000,
        ),
    ],
)
def test_memory_limits(tmp_path: Path, settings: Settings, files: dict[str, str], expected_bytes: int) -> None:
    facts = read_machine(settings, run_folder=tmp_path, probe=probe(tmp_path, files))
    assert facts.host_memory_bytes == expected_bytes


def test_a_gpu_is_taken_with_the_memory_that_is_free(tmp_path: Path, settings: Settings) -> None:
    facts = read_machine(settings, run_folder=tmp_path, probe=probe(tmp_path, gpus=TWO_GPUS))
    assert (facts.device, facts.device_name, facts.device_count) == ("cuda", "NVIDIA H100 80GB HBM3", 2)
    assert (facts.device_memory_bytes, facts.bf16) == (80994 * 1024 * 1024, True)


@pytest.mark.parametrize(
    ("visible", "device", "name", "bf16"),
    [
        (None, "cuda", "NVIDIA H100 80GB HBM3", True),
        ("1", "cuda", "Tesla T4", False),
        ("1,0", "cuda", "Tesla T4", False),
        ("GPU-bbb", "cuda", "Tesla T4", False),
        ("", "cpu", "", False),
        ("-1", "cpu", "", False),
        ("7", "cpu", "", False),
    ],
)
def test_visible_devices(
    tmp_path: Path, settings: Settings, visible: str | None, device: str, name: str, bf16: bool
) -> None:
    facts = read_machine(
        replace(settings, visible_devices=visible), run_folder=tmp_path, probe=probe(tmp_path, gpus=TWO_GPUS)
    )
    assert (facts.device, facts.bf16) == (device, bf16)
    assert device == "cpu" or facts.device_name == name


def test_a_torch_for_cpus_has_no_gpu(tmp_path: Path, settings: Settings) -> None:
    found = probe(tmp_path, gpus=TWO_GPUS, torch="2.13.0+cpu")
    assert read_machine(settings, run_folder=tmp_path, probe=found).device == "cpu"


@pytest.mark.parametrize(
    "answer", ["", "No devices were found\n", "0, GPU-a, X, [N/A], 9.0\n", "0, GPU-a, X, 100, [N/A]\n"]
)
def test_answers_that_name_no_gpu(answer: str) -> None:
    assert parse_gpus(answer) == []


def test_this_machine(settings: Settings, tmp_path: Path) -> None:
    real = this_machine()
    facts = read_machine(settings, run_folder=tmp_path, probe=real)
    assert 1 <= facts.cores <= real.cores
    assert facts.host_memory_bytes > 0
    assert real.query(("no-such-program-anywhere",)) is None
    assert real.query((sys.executable, "-c", "print('yes')")) == "yes\n"
    assert real.query((sys.executable, "-c", "raise SystemExit(3)")) is None
    assert NVIDIA_QUERY[0] == "nvidia-smi"


def test_the_setting_is_read_from_the_environment() -> None:
    assert read_settings({}).visible_devices is None
    assert read_settings({"CUDA_VISIBLE_DEVICES": "1"}).visible_devices == "1"


def test_planning_imports_no_torch() -> None:
    modules = "tenon.plan.decide, tenon.plan.combine, tenon.plan.explain, tenon.plan.machine, tenon.recipe.load"
    script = f"import sys, {modules}; raise SystemExit(int('torch' in sys.modules or 'numpy' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
