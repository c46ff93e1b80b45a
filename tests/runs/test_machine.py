"""The record of a machine: with a fake sensor, without one, and in a run folder."""

from __future__ import annotations

from pathlib import Path

from tenon.errors import RunError
from tenon.runs.fake_nvml import FakeSensor
from tenon.runs.folder import RunFolder
from tenon.runs.machine import MachineRecord, record_machine
from tenon.runs.nvml import GpuSensor


def no_sensor(_visible: str | None) -> GpuSensor:
    raise RunError("run-no-telemetry", "no", got="NVML Shared Library Not Found", hint="h")


def test_with_a_gpu() -> None:
    sensor = FakeSensor([])
    record = record_machine(None, torch_cuda="13.0", open_sensor=lambda _visible: sensor)
    assert (record.driver, record.driver_cuda, record.torch_cuda) == ("580.65.06", "13.0", "13.0")
    (gpu,) = record.gpus
    assert (gpu.name, gpu.capability, gpu.free_bytes) == ("NVIDIA Fake 80GB", "9.0", 79_000_000_000)
    assert record.no_gpu == "" and sensor.closed


def test_without_one() -> None:
    record = record_machine("0", open_sensor=no_sensor)
    assert record.gpus == () and record.driver == "" and record.no_gpu == "NVML Shared Library Not Found"
    assert record.packages["torch"] and record.packages["tenonlm"]


def test_it_is_a_value_that_a_run_keeps(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", plan_json="{}", recipe_text="")
    assert run.machine() is None
    record = record_machine(None, open_sensor=no_sensor)
    run.write_machine(record.to_json())
    text = run.machine()
    assert text is not None and MachineRecord.from_json(text) == record
