"""A `GpuSensor` without a GPU: the seam on which telemetry is tried out. It says what it was told to say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tenon.runs.nvml import Driver, GpuCard, GpuSample, gpu_lost

FAKE_CARD = GpuCard(
    index=0,
    uuid="GPU-fake-0",
    name="NVIDIA Fake 80GB",
    capability=(9, 0),
    total_bytes=80_000_000_000,
    free_bytes=79_000_000_000,
)

FAKE_DRIVER = Driver("580.65.06", (13, 0))


def fake_sample(utilisation_percent: float | None = 95.0, *, gpu: int = 0) -> GpuSample:
    """A GPU at work, as busy as asked."""
    return GpuSample(gpu, utilisation_percent, 45_000_000_000, 410.0, 61.0, 1755.0, ("power cap",))


class FakeSensor:
    """Gives the samples one after another, the last one again and again; None is a GPU that is lost."""

    def __init__(
        self,
        samples: Iterable[GpuSample | None],
        *,
        driver: Driver = FAKE_DRIVER,
        cards: tuple[GpuCard, ...] = (FAKE_CARD,),
    ) -> None:
        self._samples: Iterator[GpuSample | None] = iter(samples)
        self._last: GpuSample | None = None
        self._driver, self._cards = driver, cards
        self.asked = 0
        self.closed = False

    def driver(self) -> Driver:
        """The driver that it was given."""
        return self._driver

    def cards(self) -> tuple[GpuCard, ...]:
        """The cards that it was given."""
        return self._cards

    def sample(self) -> tuple[GpuSample, ...]:
        """The next sample. Raises TrainError train-gpu-lost at a None."""
        self.asked += 1
        self._last = next(self._samples, self._last)
        if self._last is None:
            raise gpu_lost("GPU is lost")
        return (self._last,)

    def close(self) -> None:
        """Remember that it was closed."""
        self.closed = True
