"""GPU telemetry of a run: a thread that samples the GPUs into `gpu` events, and a warning when they wait.

Each event holds what a few seconds of samples came to. Events go into the log alone: trackers are told everything from
the loop's thread. A GPU that is lost is remembered in `lost`, for the error that the loop is about to meet; if the loop
hangs instead, `on_stuck` is called. This module does not know what NVML is (runs.nvml) nor who trains.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from tenon.errors import RunError, TenonError, TrainError
from tenon.runs.events import Event, EventLog, Scalar
from tenon.runs.nvml import GpuSample, GpuSensor
from tenon.runs.utilisation import UtilisationWatch


@dataclass(frozen=True, slots=True)
class Cadence:
    """How often GPUs are asked, how often an event is written, how long a lost GPU may keep the loop waiting."""

    sample_seconds: float = 1.0
    event_seconds: float = 5.0
    grace_seconds: float = 30.0


CADENCE = Cadence()
# The end of a run waits this long for an answer of NVML that is under way.
_JOIN_SECONDS = 5.0


class GpuTelemetry:
    """Samples while `sampling()` lasts, and is an event sink: it judges the steps that it is told."""

    def __init__(
        self,
        open_sensor: Callable[[], GpuSensor] | None,
        log: EventLog,
        watch: UtilisationWatch,
        *,
        on_stuck: Callable[[TenonError], None],
        cadence: Cadence = CADENCE,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """open_sensor: called in the sampling thread; raises RunError run-no-telemetry. None: no GPU is in use."""
        self._open, self._log, self._watch = open_sensor, log, watch
        self._on_stuck, self._cadence, self._clock = on_stuck, cadence, clock
        self._stop = threading.Event()
        self._said: set[str] = set()
        self.lost: TenonError | None = None

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Sample until the end of the block. A failure of training while a GPU is lost is that loss: TrainError."""
        if self._open is None:
            yield
            return
        thread = threading.Thread(target=self._run, args=(self._open,), name="gpu-telemetry", daemon=True)
        thread.start()
        try:
            yield
        except TrainError as error:
            if self.lost is not None and error.code == "train-kernel-failed":
                raise self.lost from error
            raise
        finally:
            self._stop.set()
            thread.join(_JOIN_SECONDS)

    def emit(self, event: Event) -> None:
        """Take one event of the loop; a window of steps in which the GPUs waited becomes a warning, once a cause."""
        if event["kind"] != "step" or self._open is None:
            return
        verdict = self._watch.take_step(event)
        if verdict is not None and verdict.cause not in self._said:
            self._said.add(verdict.cause)
            self._log.emit(
                "warning",
                code="train-gpu-idle",
                cause=verdict.cause,
                utilisation_percent=round(verdict.utilisation_percent, 1),
                text=verdict.text,
            )

    def close(self) -> None:
        """Nothing is buffered."""

    def _run(self, open_sensor: Callable[[], GpuSensor]) -> None:
        try:
            sensor = open_sensor()
        except TenonError as error:
            text = f"{error.what}, so this run has no GPU telemetry ({error.got}): {error.hint}"
            self._log.emit("warning", code=error.code, text=text)
            return
        with suppress(RunError):  # a full disk: the loop will meet it itself
            self._sample(sensor)
        sensor.close()
        if self.lost is not None and not self._stop.wait(self._cadence.grace_seconds):
            self._on_stuck(self.lost)

    def _sample(self, sensor: GpuSensor) -> None:
        """Until the end, or until a GPU is lost."""
        gathered: list[Sequence[GpuSample]] = []
        written = time.monotonic()
        while True:
            last = self._stop.wait(self._cadence.sample_seconds)
            try:
                samples = sensor.sample()
            except TenonError as error:
                self.lost = error
                samples = ()
            if samples:
                gathered.append(samples)
                percents = [s.utilisation_percent for s in samples if s.utilisation_percent is not None]
                if percents:
                    self._watch.take_sample(self._clock(), sum(percents) / len(percents))
            ends = last or self.lost is not None
            if gathered and (ends or time.monotonic() - written >= self._cadence.event_seconds):
                for fields in summarise(gathered):
                    self._log.emit("gpu", **fields)
                gathered, written = [], time.monotonic()
            if ends:
                return


def end_as_failed(log: EventLog, error: TenonError) -> None:
    """End the process from another thread: the loop waits in the driver for a GPU that will not answer.

    Checkpoints are complete or absent at any instant, so nothing is lost. The light side reads the event.
    """
    log.emit("failed", code=error.code, text=error.what, got=error.got, hint=error.hint)
    log.sync()
    os._exit(error.exit_status)


def summarise(gathered: Sequence[Sequence[GpuSample]]) -> list[dict[str, Scalar]]:
    """The fields of one `gpu` event for each GPU: means of utilisation, power and clock; the most of the rest."""
    by_gpu: dict[int, list[GpuSample]] = {}
    for samples in gathered:
        for sample in samples:
            by_gpu.setdefault(sample.gpu, []).append(sample)
    return [
        {
            "gpu": gpu,
            "utilisation_percent": _mean([s.utilisation_percent for s in samples]),
            "memory_used_bytes": max((s.memory_used_bytes for s in samples if s.memory_used_bytes), default=None),
            "power_watts": _mean([s.power_watts for s in samples]),
            "temperature_celsius": max(
                (s.temperature_celsius for s in samples if s.temperature_celsius is not None), default=None
            ),
            "sm_clock_mhz": _mean([s.sm_clock_mhz for s in samples]),
            "throttled": ", ".join(dict.fromkeys(name for s in samples for name in s.throttled)),
        }
        for gpu, samples in by_gpu.items()
    ]


def summarise_events(events: Iterable[Event]) -> list[dict[str, Scalar]]:
    """What the `gpu` events of a run came to while it took steps, one summary a GPU, fields as in the events."""
    kept = [event for event in events if event["kind"] in ("gpu", "step")]
    steps = [place for place, event in enumerate(kept) if event["kind"] == "step"]
    if not steps:
        return []
    during = [event for event in kept[steps[0] : steps[-1] + 2] if event["kind"] == "gpu"]
    return summarise([[_sample_of(event) for event in during]])


def _sample_of(event: Event) -> GpuSample:
    memory = _told(event, "memory_used_bytes")
    return GpuSample(
        gpu=int(_told(event, "gpu") or 0),
        utilisation_percent=_told(event, "utilisation_percent"),
        memory_used_bytes=None if memory is None else int(memory),
        power_watts=_told(event, "power_watts"),
        temperature_celsius=_told(event, "temperature_celsius"),
        sm_clock_mhz=_told(event, "sm_clock_mhz"),
        throttled=tuple(name for name in str(event.get("throttled") or "").split(", ") if name),
    )


def _told(event: Event, key: str) -> float | None:
    value = event.get(key)
    return float(value) if isinstance(value, int | float) else None


def _mean(values: Sequence[float | None]) -> float | None:
    told = [value for value in values if value is not None]
    return round(sum(told) / len(told), 1) if told else None
