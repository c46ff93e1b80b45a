"""`tenon doctor` on screen and as JSON, over the fake worker."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from tenon.cli.doctor_view import show_doctor
from tenon.cli.gpu_view import gpu_busy, gpu_text
from tenon.runs.events import Scalar
from tenon.runs.folder import RunFolder
from tenon.runs.machine import GpuRecord, MachineRecord
from tenon.service.advice import Advice
from tenon.service.disk import DiskSpeed
from tenon.service.doctor import CheckResult, DoctorReport
from tenon.service.network import Link

from .conftest import Command

H100 = GpuRecord(index=0, name="NVIDIA H100", capability="9.0", total_bytes=80_000_000_000, free_bytes=79_000_000_000)


def shown(report: DoctorReport) -> str:
    file = io.StringIO()
    show_doctor(Console(file=file, width=200), report)
    return file.getvalue()


def check(state: str, **changes: object) -> CheckResult:
    fields = {
        "name": "attention varlen", "device": "cuda", "state": state, "error": None, "bound": 2e-2, "text": "",
        "instead": "padded rows", "seconds": 0.1,
    }  # fmt: skip
    return CheckResult.model_validate({**fields, **changes})


REPORT = DoctorReport(
    machine=MachineRecord(
        python="3.12.1", system="Linux", cores=16, packages={"torch": "2.13.0"}, torch_cuda="13.0", cudnn="91300",
        driver="580.65.06", driver_cuda="13.0", gpus=(H100,),
    ),
    checks=(
        check("works", error=3.2e-3), check("wrong", error=0.7), check("fails", text="RuntimeError: no plan"),
        check("unavailable", text="it needs a GPU of capability 9.0 or later, and this one has 8.0"),
    ),
    disk=DiskSpeed(folder="/cache", free_bytes=10**12, write_bytes_per_second=1.2e9, read_bytes_per_second=3e9),
    loopback=Link(target="127.0.0.1", seconds=5e-5, bytes_per_second=2e9),
    hub=Link(target="https://hub", problem="timed out"),
    advice=(Advice(what="the driver is old", do="install another", blocks=True), Advice(what="slow disk", do="move")),
)  # fmt: skip


def test_a_report_on_screen() -> None:
    text = shown(REPORT)
    assert "580.65.06, speaks CUDA 13.0" in text and "built for CUDA 13.0, cuDNN 91300" in text
    assert "NVIDIA H100, capability 9.0, 79.0 GB of 80.0 GB free" in text
    assert "/cache: 1.0 TB free, writes 1.2 GB/s, reads 3.0 GB/s" in text
    assert "https://hub: timed out" in text
    lines = text.splitlines()
    (works,) = [line for line in lines if " works " in line]
    assert "3.2e-03" in works and "2e-02" in works and "instead" not in works
    (wrong,) = [line for line in lines if " wrong " in line]
    assert "7.0e-01" in wrong and "used instead: padded rows" in wrong
    (fails,) = [line for line in lines if " fails " in line]
    assert "RuntimeError: no plan; used instead: padded rows" in fails
    (unavailable,) = [line for line in lines if " unavailable " in line]
    assert "9.0 or later, and this one has 8.0; used instead: padded rows" in unavailable
    assert text.index("needed: the driver is old") < text.index("advice: slow disk")


def test_a_machine_in_order_says_so() -> None:
    cpu = REPORT.machine.model_copy(update={"gpus": (), "driver": "", "no_gpu": "NVML Shared Library Not Found"})
    text = shown(REPORT.model_copy(update={"machine": cpu, "checks": (check("absent"),), "advice": (), "hub": None}))
    assert "nothing to do" in text and "none (NVML Shared Library Not Found)" in text
    assert "1 more need a GPU" in text and "not asked" in text


def test_the_command(tenon: Command) -> None:
    done = tenon("doctor")
    assert done.status == 0 and "product" in done.out and "no product" in done.out
    assert "trying out kernels" in done.err


def test_json(tenon: Command) -> None:
    done = tenon("doctor", "--json")
    report = json.loads(done.out)
    assert done.status == 0 and done.err == ""
    assert [one["state"] for one in report["checks"]] == ["works", "fails", "absent"]
    assert set(report) == {"machine", "checks", "disk", "loopback", "hub", "advice"}


GPU: dict[str, Scalar] = {
    "gpu": 0, "utilisation_percent": 97.0, "memory_used_bytes": 45_000_000_000, "power_watts": 412.3,
    "temperature_celsius": 61.0, "sm_clock_mhz": 1755.0, "throttled": "power cap",
}  # fmt: skip


def test_the_load_of_gpus_in_one_line() -> None:
    assert gpu_text([GPU]) == "GPU 97% busy, 45.0 GB, 412 W, 61 °C, 1,755 MHz, held back by power cap"
    other = {**GPU, "gpu": 1, "utilisation_percent": 91.0, "temperature_celsius": 70.0, "throttled": ""}
    assert gpu_text([GPU, other]).startswith("2 GPUs 91% to 97% busy, 90.0 GB, 825 W, 70 °C")
    assert gpu_text([]) == gpu_busy([]) == ""
    assert gpu_text([{"gpu": 0, "utilisation_percent": None, "power_watts": 55.0}]) == "55 W"


def test_show_has_the_load_of_the_gpus(tenon: Command, workplace: Path) -> None:
    tenon("train", "demo.yaml", "-q")
    (folder,) = (workplace / "runs").iterdir()
    RunFolder.open(folder).events.emit("gpu", **GPU)
    assert "  GPU 97% busy, 45.0 GB, 412 W" in tenon("show", "demo").out
    assert json.loads(tenon("show", "demo", "--json").out)["gpus"] == [GPU]
