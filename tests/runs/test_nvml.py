"""NVML's answers: what a GPU does not tell is None, a GPU that is lost is one error, visible devices are CUDA's."""

from __future__ import annotations

import pytest

from tenon.errors import RunError, TrainError
from tenon.runs.nvml import GPU_IS_LOST, RESET_REQUIRED, NvmlSensor, open_nvml, throttle_names, visible_places

UUIDS = ["GPU-aaa1", "GPU-aaa2", "GPU-bbb3"]
NOT_SUPPORTED = 3


class FakeNvmlError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__("GPU is lost" if value == GPU_IS_LOST else f"status {value}")
        self.value = value


class Answer:
    """A struct of NVML."""

    def __init__(self, **fields: int) -> None:
        self.__dict__.update(fields)


class Nvml:
    """Stands in for the module pynvml; `failing` maps a function's name to the status that it fails with."""

    NVMLError = FakeNvmlError
    NVML_TEMPERATURE_GPU = 0
    NVML_CLOCK_SM = 1

    def __init__(self, **failing: int) -> None:
        self.failing = failing

    def say(self, name: str, answer: object) -> object:
        if name in self.failing:
            raise FakeNvmlError(self.failing[name])
        return answer

    def nvmlSystemGetDriverVersion(self) -> object:
        return self.say("driver", "570.86.10")

    def nvmlSystemGetCudaDriverVersion_v2(self) -> object:
        return self.say("cuda", 12080)

    def nvmlDeviceGetMemoryInfo(self, _handle: object) -> object:
        return self.say("memory", Answer(total=80, free=60, used=20))

    def nvmlDeviceGetCudaComputeCapability(self, _handle: object) -> object:
        return self.say("capability", (9, 0))

    def nvmlDeviceGetUUID(self, _handle: object) -> object:
        return self.say("uuid", "GPU-x")

    def nvmlDeviceGetName(self, _handle: object) -> object:
        return self.say("name", "NVIDIA H100")

    def nvmlDeviceGetUtilizationRates(self, _handle: object) -> object:
        return self.say("load", Answer(gpu=97, memory=40))

    def nvmlDeviceGetPowerUsage(self, _handle: object) -> object:
        return self.say("power", 412_300)

    def nvmlDeviceGetTemperature(self, _handle: object, _sensor: int) -> object:
        return self.say("temperature", 61)

    def nvmlDeviceGetClockInfo(self, _handle: object, _clock: int) -> object:
        return self.say("clock", 1755)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, _handle: object) -> object:
        return self.say("reasons", 0x1 | 0x4 | 0x40)

    def nvmlShutdown(self) -> None:
        self.say("shutdown", None)


def test_a_sample_has_every_figure() -> None:
    (sample,) = NvmlSensor(Nvml(), {1: "handle"}).sample()
    assert (sample.gpu, sample.utilisation_percent, sample.memory_used_bytes) == (1, 97.0, 20)
    assert (sample.power_watts, sample.temperature_celsius, sample.sm_clock_mhz) == (412.3, 61, 1755)
    assert sample.throttled == ("power cap", "hardware thermal limit")


def test_driver_and_cards() -> None:
    sensor = NvmlSensor(Nvml(), {0: "handle"})
    assert (sensor.driver().version, sensor.driver().cuda) == ("570.86.10", (12, 8))
    (card,) = sensor.cards()
    assert (card.name, card.capability, card.total_bytes, card.free_bytes) == ("NVIDIA H100", (9, 0), 80, 60)


@pytest.mark.parametrize("name", ["load", "memory", "power", "temperature", "clock", "reasons"])
def test_what_a_gpu_does_not_tell_is_left_out(name: str) -> None:
    """A slice of a GPU (MIG) and virtual GPUs tell less."""
    (sample,) = NvmlSensor(Nvml(**{name: NOT_SUPPORTED}), {0: "handle"}).sample()
    told = [sample.utilisation_percent, sample.memory_used_bytes, sample.power_watts, sample.temperature_celsius]
    assert [*told, sample.sm_clock_mhz].count(None) == (0 if name == "reasons" else 1)


@pytest.mark.parametrize("status", [GPU_IS_LOST, RESET_REQUIRED])
def test_a_lost_gpu_is_one_error(status: int) -> None:
    with pytest.raises(TrainError) as error:
        NvmlSensor(Nvml(memory=status), {0: "handle"}).sample()
    assert error.value.code == "train-gpu-lost" and "tenon resume" in error.value.hint


def test_closing_never_fails() -> None:
    NvmlSensor(Nvml(shutdown=GPU_IS_LOST), {}).close()


def test_names_of_throttle_reasons() -> None:
    assert throttle_names(0) == throttle_names(1) == ()
    assert throttle_names(0x28) == ("hardware slowdown", "software thermal limit")


@pytest.mark.parametrize(
    ("visible", "places"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("2,0", [2, 0]),
        ("GPU-b", [2]),
        ("GPU-aaa2, 0", [1, 0]),
        ("1,7,0", [1]),  # as CUDA: up to the first that names none
        ("GPU-aaa", []),  # names two
        ("-1", []),
    ],
)
def test_visible_devices(visible: str | None, places: list[int]) -> None:
    assert visible_places(list(enumerate(UUIDS)), visible) == places


def test_a_machine_without_a_driver_says_so() -> None:
    pynvml = pytest.importorskip("pynvml")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        with pytest.raises(RunError) as error:
            open_nvml(None)
        assert error.value.code == "run-no-telemetry" and "nvidia-smi" in error.value.hint
    else:
        pytest.skip("there is a driver")
