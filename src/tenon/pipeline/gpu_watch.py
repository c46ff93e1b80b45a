"""A run's machine and its GPUs: `machine.json` at the start, telemetry while it works, a driver that will do.

This module does not know training.
"""

from __future__ import annotations

from functools import partial

import torch

from tenon.plan.driver import driver_problem
from tenon.plan.values import Plan
from tenon.runs.folder import RunFolder
from tenon.runs.machine import MachineRecord, record_machine
from tenon.runs.nvml import open_nvml
from tenon.runs.telemetry import GpuTelemetry, end_as_failed
from tenon.runs.utilisation import UtilisationWatch
from tenon.settings import Settings


def this_machine(settings: Settings) -> MachineRecord:
    """The record of this machine, with what torch knows; CUDA itself is not started."""
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    return record_machine(
        settings.visible_devices, torch_cuda=torch.version.cuda or "", cudnn=str(cudnn) if cudnn else ""
    )


def note_machine(run: RunFolder, plan: Plan, settings: Settings) -> None:
    """Write `machine.json`. Raises PlanError plan-driver when the planned GPU cannot be used with this driver."""
    record = this_machine(settings)
    run.write_machine(record.to_json())
    if plan.machine.device == "cuda":
        require_driver(record, works=torch.cuda.is_available())


def require_driver(record: MachineRecord, *, works: bool) -> None:
    """Raise PlanError plan-driver when the driver is too old. works: CUDA answers, so it is not, whatever its version.

    Packages for forward compatibility make an old driver do.
    """
    problem = driver_problem(record.driver, record.driver_cuda, record.torch_cuda)
    if problem is not None and not works:
        raise problem


def gpu_telemetry(run: RunFolder, plan: Plan, settings: Settings) -> GpuTelemetry:
    """The telemetry of a run; of one on a CPU it is silent. A run that a lost GPU leaves hanging ends, as failed."""
    return GpuTelemetry(
        partial(open_nvml, settings.visible_devices, most=settings.ranks) if plan.machine.device == "cuda" else None,
        run.events,
        UtilisationWatch(micro_tokens=plan.keeping.micro_tokens),
        on_stuck=partial(end_as_failed, run.events),
    )
