"""A run's machine and its GPUs: `machine.json` at the start, telemetry while it works, a driver that will do.

This module does not know training.
"""

from __future__ import annotations

import os
from functools import partial

import torch

from tenon.errors import TenonError
from tenon.plan.driver import driver_problem
from tenon.plan.values import Plan
from tenon.runs.events import EventLog
from tenon.runs.folder import RunFolder
from tenon.runs.machine import MachineRecord, record_machine
from tenon.runs.nvml import open_nvml
from tenon.runs.telemetry import GpuTelemetry
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
    problem = driver_problem(record.driver, record.driver_cuda, record.torch_cuda)
    # What the versions say is an argument, what CUDA says decides: forward compatibility packages exist.
    if problem is not None and plan.machine.device == "cuda" and not torch.cuda.is_available():
        raise problem


def gpu_telemetry(run: RunFolder, plan: Plan, settings: Settings) -> GpuTelemetry:
    """The telemetry of a run; of one on a CPU it is silent. A run that a lost GPU leaves hanging ends, as failed."""
    return GpuTelemetry(
        partial(open_nvml, settings.visible_devices) if plan.machine.device == "cuda" else None,
        run.events,
        UtilisationWatch(micro_tokens=plan.micro_tokens),
        on_stuck=partial(_end_as_failed, run.events),
    )


def _end_as_failed(log: EventLog, error: TenonError) -> None:
    """End the process from another thread: the loop waits in the driver for a GPU that will not answer.

    Checkpoints are complete or absent at any instant, so nothing is lost. The light side reads the event.
    """
    log.emit("failed", code=error.code, text=error.what, got=error.got, hint=error.hint)
    log.sync()
    os._exit(error.exit_status)
