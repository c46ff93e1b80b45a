"""What GPUs say of themselves through NVML: the driver, the cards, and samples of their load.

`GpuSensor` is the seam; `tenon.runs.fake_nvml` is the fake beside it. Nothing here needs torch, and pynvml is imported
when a sensor is opened. This module does not know what runs on the GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from tenon.errors import RunError, TrainError

_T = TypeVar("_T")

# Bits of NVML's clock event reasons that slow a GPU down; an idle GPU (bit 0) is not slowed down.
THROTTLE_REASONS: dict[int, str] = {
    0x002: "clock setting",
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal limit",
    0x040: "hardware thermal limit",
    0x080: "power brake",
    0x100: "display clock",
    0x200: "board limit",
    0x400: "reliability",
}
# NVML's status codes, spelled out so that the module can be read without the package.
GPU_IS_LOST = 15
RESET_REQUIRED = 16
_VERSION_MISMATCH = 18


@dataclass(frozen=True, slots=True)
class Driver:
    """The kernel driver's version, and the CUDA version that it speaks as (major, minor)."""

    version: str
    cuda: tuple[int, int]


@dataclass(frozen=True, slots=True)
class GpuCard:
    """One GPU. index: as NVML counts; capability: (major, minor), (0, 0) when unknown."""

    index: int
    uuid: str
    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class GpuSample:
    """The load of one GPU at one moment; None is what this GPU does not tell.

    utilisation_percent: share of the last moments in which any kernel ran. throttled: names from THROTTLE_REASONS.
    """

    gpu: int
    utilisation_percent: float | None
    memory_used_bytes: int | None
    power_watts: float | None
    temperature_celsius: float | None
    sm_clock_mhz: float | None
    throttled: tuple[str, ...] = ()


class GpuSensor(Protocol):
    """Something that knows the GPUs of this machine."""

    def driver(self) -> Driver:
        """The driver."""
        ...

    def cards(self) -> tuple[GpuCard, ...]:
        """The GPUs that this process may use, in CUDA's order."""
        ...

    def sample(self) -> tuple[GpuSample, ...]:
        """The load of each of `cards`, now. Raises TrainError train-gpu-lost when one has gone."""
        ...

    def close(self) -> None:
        """No question follows."""
        ...


def open_nvml(visible_devices: str | None, *, most: int | None = None) -> GpuSensor:
    """The GPUs that `visible_devices` (CUDA_VISIBLE_DEVICES; None: all) leaves visible, the first `most` of them.

    Raises RunError run-no-telemetry when there is no NVML, no driver, or no GPU.
    """
    try:
        import pynvml
    except ImportError as error:
        raise _no_telemetry(str(error), hint="pip install 'tenonlm[train]', which brings nvidia-ml-py") from error
    try:
        pynvml.nvmlInit()
        count = int(pynvml.nvmlDeviceGetCount())
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        uuids = [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    except pynvml.NVMLError as error:
        if _status(error) == _VERSION_MISMATCH:
            hint = "the driver was updated while the machine ran: restart it"
        else:
            hint = "check that `nvidia-smi` lists the GPUs; in a container, start it with --gpus all"
        raise _no_telemetry(str(error), hint=hint) from error
    places = visible_places(list(enumerate(uuids)), visible_devices)[:most]
    if not places:
        pynvml.nvmlShutdown()
        raise _no_telemetry("no GPU is visible", hint="unset CUDA_VISIBLE_DEVICES, or name a GPU that exists")
    return NvmlSensor(pynvml, {place: handles[place] for place in places})


def visible_places(gpus: Sequence[tuple[int, str]], visible_devices: str | None) -> list[int]:
    """Places in `gpus` of the visible ones, in CUDA's order: as listed, up to the first entry that names none.

    gpus: index and UUID of each. visible_devices: CUDA_VISIBLE_DEVICES; None is all.
    """
    if visible_devices is None:
        return list(range(len(gpus)))
    chosen: list[int] = []
    for entry in (part.strip() for part in visible_devices.split(",")):
        named = [
            at for at, (index, uuid) in enumerate(gpus) if entry and (str(index) == entry or uuid.startswith(entry))
        ]
        if len(named) != 1:
            break
        chosen += named
    return chosen


class NvmlSensor:
    """`GpuSensor` of the real GPUs. Use `open_nvml`."""

    def __init__(self, nvml: Any, handles: dict[int, Any]) -> None:
        """nvml: the module pynvml, initialised. handles: NVML's index -> its handle."""
        self._nvml = nvml
        self._handles = handles

    def driver(self) -> Driver:
        """See `GpuSensor.driver`."""
        version = self._ask(self._nvml.nvmlSystemGetDriverVersion) or ""
        number = self._ask(self._nvml.nvmlSystemGetCudaDriverVersion_v2) or 0
        return Driver(str(version), (number // 1000, number % 1000 // 10))

    def cards(self) -> tuple[GpuCard, ...]:
        """See `GpuSensor.cards`."""
        return tuple(self._card(index, handle) for index, handle in self._handles.items())

    def sample(self) -> tuple[GpuSample, ...]:
        """See `GpuSensor.sample`."""
        return tuple(self._sample(index, handle) for index, handle in self._handles.items())

    def close(self) -> None:
        """See `GpuSensor.close`."""
        with suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    def _card(self, index: int, handle: Any) -> GpuCard:
        nvml = self._nvml
        memory = self._ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        capability = self._ask(lambda: nvml.nvmlDeviceGetCudaComputeCapability(handle)) or (0, 0)
        return GpuCard(
            index=index,
            uuid=str(self._ask(lambda: nvml.nvmlDeviceGetUUID(handle)) or ""),
            name=str(self._ask(lambda: nvml.nvmlDeviceGetName(handle)) or "GPU"),
            capability=(int(capability[0]), int(capability[1])),
            total_bytes=int(memory.total) if memory else 0,
            free_bytes=int(memory.free) if memory else 0,
        )

    def _sample(self, index: int, handle: Any) -> GpuSample:
        nvml = self._nvml
        load = self._ask(lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
        memory = self._ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        milliwatts = self._ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        reasons = self._ask(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)) or 0
        return GpuSample(
            gpu=index,
            utilisation_percent=float(load.gpu) if load else None,
            memory_used_bytes=int(memory.used) if memory else None,
            power_watts=None if milliwatts is None else milliwatts / 1000,
            temperature_celsius=self._ask(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            sm_clock_mhz=self._ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            throttled=throttle_names(int(reasons)),
        )

    def _ask(self, question: Callable[[], _T]) -> _T | None:
        """The answer, or None where this GPU or driver gives none. Raises TrainError train-gpu-lost."""
        try:
            return question()
        except self._nvml.NVMLError as error:
            if _status(error) in (GPU_IS_LOST, RESET_REQUIRED):
                raise gpu_lost(str(error)) from error
            return None


def throttle_names(bits: int) -> tuple[str, ...]:
    """The names of a mask of clock event reasons."""
    return tuple(name for bit, name in THROTTLE_REASONS.items() if bits & bit)


def gpu_lost(got: str, *, resume: str = "tenon resume RUN") -> TrainError:
    """The error of a GPU that has gone in the middle of a run. resume: the command that goes on with it."""
    return TrainError(
        "train-gpu-lost",
        "the GPU is gone: it fell off the bus, failed in its hardware, or was taken by another process",
        got=got,
        hint=f"checkpoints are kept; once `nvidia-smi` lists the GPU again (restart the machine if not): {resume}",
    )


def _no_telemetry(got: str, *, hint: str) -> RunError:
    return RunError("run-no-telemetry", "the GPUs cannot be watched", got=got, hint=hint)


def _status(error: Any) -> int:
    """NVML's status code of one of its exceptions."""
    return int(error.value)
