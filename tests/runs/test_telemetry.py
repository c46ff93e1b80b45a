"""The sampling thread, with a fake sensor: events, one warning a cause, a GPU that is lost, a loop that hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tenon.errors import RunError, TenonError, TrainError
from tenon.runs.events import Event, EventLog
from tenon.runs.fake_nvml import FakeSensor, fake_sample
from tenon.runs.nvml import GpuSample, GpuSensor
from tenon.runs.telemetry import Cadence, GpuTelemetry, summarise, summarise_events
from tenon.runs.utilisation import UtilisationWatch

QUICK = Cadence(sample_seconds=0.005, event_seconds=0.02, grace_seconds=0.05)


def telemetry_of(
    log: EventLog,
    open_sensor: Callable[[], GpuSensor] | None,
    *,
    on_stuck: Callable[[TenonError], None] = lambda _error: None,
) -> GpuTelemetry:
    return GpuTelemetry(open_sensor, log, UtilisationWatch(micro_tokens=4096), on_stuck=on_stuck, cadence=QUICK)


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    return EventLog(tmp_path / "events.jsonl")


def of(log: EventLog, kind: str) -> list[Event]:
    return [event for event in log.read() if event["kind"] == kind]


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_events_come_while_the_block_lasts_and_the_sensor_is_closed(log: EventLog) -> None:
    sensor = FakeSensor([fake_sample(97.0)])
    with telemetry_of(log, lambda: sensor).sampling():
        wait_for(lambda: len(of(log, "gpu")) >= 2)
    event = of(log, "gpu")[0]
    assert {key: event[key] for key in event if key not in ("t", "kind")} == {
        "gpu": 0, "utilisation_percent": 97.0, "memory_used_bytes": 45_000_000_000, "power_watts": 410.0,
        "temperature_celsius": 61.0, "sm_clock_mhz": 1755.0, "throttled": "power cap",
    }  # fmt: skip
    assert sensor.closed
    count = len(of(log, "gpu"))
    time.sleep(0.05)
    assert len(of(log, "gpu")) == count


def test_a_short_run_still_leaves_an_event(log: EventLog) -> None:
    with telemetry_of(log, lambda: FakeSensor([fake_sample()])).sampling():
        pass
    assert len(of(log, "gpu")) == 1


def test_a_machine_without_nvml_is_said_once_and_the_run_goes_on(log: EventLog) -> None:
    def missing() -> GpuSensor:
        raise RunError("run-no-telemetry", "the GPUs cannot be watched", got="no NVML", hint="install it")

    with telemetry_of(log, missing).sampling():
        time.sleep(0.05)
    (warning,) = log.read()
    assert warning["code"] == "run-no-telemetry" and "no NVML" in str(warning["text"])


def test_a_run_on_a_cpu_has_no_thread_and_no_events(log: EventLog) -> None:
    before = threading.active_count()
    telemetry = telemetry_of(log, None)
    with telemetry.sampling():
        assert threading.active_count() == before
        telemetry.emit({"t": 1.0, "kind": "step", "seconds": 1.0})
    assert list(log.read()) == []


def test_the_warning_comes_once_a_cause(log: EventLog) -> None:
    watch = UtilisationWatch(micro_tokens=4096)
    telemetry = GpuTelemetry(lambda: FakeSensor([]), log, watch, on_stuck=lambda _error: None)
    for number in range(200):
        # The second half waits for rows.
        waiting = 0.0 if number < 100 else 0.6
        watch.take_sample(number + 0.5, 30.0)
        telemetry.emit(
            {"t": number + 1.0, "kind": "step", "seconds": 1 + number * 1e-6, "data_seconds": waiting, "tokens": 100}
        )
    warnings = of(log, "warning")
    assert [(warning["code"], warning["cause"]) for warning in warnings] == [
        ("train-gpu-idle", "batch"), ("train-gpu-idle", "data"),
    ]  # fmt: skip
    assert warnings[0]["utilisation_percent"] == 30.0


def test_a_failure_while_the_gpu_is_lost_is_that_loss(log: EventLog) -> None:
    telemetry = telemetry_of(log, lambda: FakeSensor([fake_sample(), None]))
    failed = TrainError("train-kernel-failed", "a kernel failed", hint="h")
    with pytest.raises(TrainError) as error, telemetry.sampling():
        wait_for(lambda: telemetry.lost is not None)
        raise failed
    assert error.value.code == "train-gpu-lost" and error.value.__cause__ is failed
    assert len(of(log, "gpu")) == 1


def test_other_failures_stay_what_they_are(log: EventLog) -> None:
    with pytest.raises(TrainError) as error, telemetry_of(log, lambda: FakeSensor([None])).sampling():
        raise TrainError("train-not-finite", "nan", hint="h")
    assert error.value.code == "train-not-finite"


def test_a_loop_that_hangs_on_a_lost_gpu_is_ended(log: EventLog) -> None:
    stuck: list[TenonError] = []
    with telemetry_of(log, lambda: FakeSensor([None]), on_stuck=stuck.append).sampling():
        wait_for(lambda: bool(stuck))
    assert stuck[0].code == "train-gpu-lost"


def test_a_loop_that_notices_by_itself_is_not(log: EventLog) -> None:
    stuck: list[TenonError] = []
    telemetry = telemetry_of(log, lambda: FakeSensor([None]), on_stuck=stuck.append)
    with telemetry.sampling():
        wait_for(lambda: telemetry.lost is not None)
    time.sleep(0.1)
    assert stuck == []


def test_a_full_disk_ends_the_sampling_alone(log: EventLog) -> None:
    class FullLog(EventLog):
        def emit(self, kind: str, **fields: object) -> Event:
            raise RunError("run-disk-full", "no space", hint="free some")

    sensor = FakeSensor([fake_sample()])
    with telemetry_of(FullLog(log.path), lambda: sensor).sampling():
        wait_for(lambda: sensor.closed)


def test_several_gpus_and_gaps() -> None:
    one = GpuSample(0, 90.0, 10, 300.0, 60.0, 1500.0, ("power cap",))
    two = GpuSample(0, 100.0, 30, None, 70.0, 1700.0, ("sync boost", "power cap"))
    other = GpuSample(1, None, None, None, None, None)
    first, second = summarise([(one, other), (two, other)])
    assert first == {
        "gpu": 0, "utilisation_percent": 95.0, "memory_used_bytes": 30, "power_watts": 300.0,
        "temperature_celsius": 70.0, "sm_clock_mhz": 1600.0, "throttled": "power cap, sync boost",
    }  # fmt: skip
    assert second["gpu"] == 1 and second["utilisation_percent"] is None and second["throttled"] == ""


def test_the_events_of_a_run_come_to_one_summary_a_gpu_of_the_time_in_which_it_took_steps() -> None:
    def gpu(percent: float, reasons: str = "") -> Event:
        return {"t": 1.0, "kind": "gpu", "gpu": 0, "utilisation_percent": percent, "throttled": reasons}

    step: Event = {"t": 1.0, "kind": "step"}
    checkpoint: Event = {"t": 1.0, "kind": "checkpoint"}
    events = [gpu(0.0), step, gpu(90.0, "power cap, sync boost"), checkpoint, step, gpu(100.0), gpu(10.0), gpu(0.0)]
    (summary,) = summarise_events(events)
    assert summary["utilisation_percent"] == 95.0 and summary["throttled"] == "power cap, sync boost"
    assert summary["power_watts"] is None
    assert summarise_events([gpu(1.0)]) == summarise_events([step]) == []


def test_many_threads_may_write_one_log(log: EventLog) -> None:
    """Lines are whole, and time never goes back."""

    def write(number: int) -> None:
        for index in range(200):
            log.emit("note", thread=number, index=index, text="x" * 500)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = list(log.read())
    assert len(events) == 800
    times = [float(event["t"] or 0) for event in events]
    assert times == sorted(times)
