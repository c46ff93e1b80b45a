"""The machine that a run, or a look by `tenon doctor`, happened on: versions, driver, GPUs. `machine.json` of a run.

Cheap: package metadata and NVML, no torch and no measurement; the heavy side adds what only torch knows. This module
does not judge what it found.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib import metadata

from tenon.errors import RunError
from tenon.runs.nvml import GpuCard, GpuSensor, open_nvml
from tenon.values import Value

# What decides how the arithmetic is done; a package that is absent is left out.
PACKAGES = (
    "tenonlm",
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "bitsandbytes",
    "nvidia-cudnn-frontend",
    "nvidia-ml-py",
)


class GpuRecord(Value):
    """One GPU. capability: `9.0`, "" when unknown."""

    index: int
    name: str
    capability: str
    total_bytes: int
    free_bytes: int


class MachineRecord(Value):
    """What a machine was.

    packages: name -> version. torch_cuda: the CUDA that torch was built for; "" for a CPU build and where torch was not
    asked. cudnn: likewise. driver_cuda: the CUDA that the driver speaks. no_gpu: why no GPU is listed.
    """

    python: str
    system: str
    cores: int
    packages: dict[str, str]
    torch_cuda: str = ""
    cudnn: str = ""
    driver: str = ""
    driver_cuda: str = ""
    gpus: tuple[GpuRecord, ...] = ()
    no_gpu: str = ""


def record_machine(
    visible_devices: str | None,
    *,
    torch_cuda: str = "",
    cudnn: str = "",
    open_sensor: Callable[[str | None], GpuSensor] = open_nvml,
) -> MachineRecord:
    """The record of this machine. visible_devices: CUDA_VISIBLE_DEVICES, None for all; torch_cuda, cudnn: torch's."""
    bare = MachineRecord(
        python=platform.python_version(),
        system=platform.platform(),
        cores=os.cpu_count() or 1,
        packages=_versions(),
        torch_cuda=torch_cuda,
        cudnn=cudnn,
    )
    try:
        sensor = open_sensor(visible_devices)
    except RunError as error:
        return bare.model_copy(update={"no_gpu": error.got})
    try:
        driver = sensor.driver()
        found = {
            "driver": driver.version,
            "driver_cuda": ".".join(map(str, driver.cuda)) if driver.cuda[0] else "",
            "gpus": tuple(_gpu(card) for card in sensor.cards()),
        }
    finally:
        sensor.close()
    return bare.model_copy(update=found)


def _gpu(card: GpuCard) -> GpuRecord:
    return GpuRecord(
        index=card.index,
        name=card.name,
        capability=".".join(map(str, card.capability)) if card.capability[0] else "",
        total_bytes=card.total_bytes,
        free_bytes=card.free_bytes,
    )


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
