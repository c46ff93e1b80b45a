"""What works on this machine: versions as torch sees them, then every kernel check, one event each.

This module does not know screens, nor what is to be done about what it finds.
"""

from __future__ import annotations

import torch

from tenon.kernels.checks import CheckOutcome, KernelCheck, kernel_checks, run_check, still_answers
from tenon.pipeline import Emit
from tenon.pipeline.gpu_watch import this_machine
from tenon.plan.requests import CheckRequest
from tenon.settings import Settings


def examine(request: CheckRequest, emit: Emit, settings: Settings) -> None:
    """The events of `CheckRequest`. Ends early, without `finished`, when a kernel took the GPU from this process."""
    emit("machine", machine=this_machine(settings).model_dump(mode="json"))
    if settings.threads:
        torch.set_num_threads(settings.threads)
    on_gpu = torch.cuda.is_available()
    checks = kernel_checks()
    for place, check in enumerate(checks):
        if check_key(check) in request.done:
            continue
        emit(
            "progress",
            what=check.name,
            done=place,
            total=len(checks),
            key=check_key(check),
            device=check.needs,
            bound=check.bound,
            instead=check.instead,
        )
        if check.needs == "cuda" and not on_gpu:
            _tell(emit, check, "absent")
            continue
        device = torch.device(check.needs)
        outcome = run_check(check, device)
        state = state_of(check, outcome)
        _tell(emit, check, state, error=outcome.error, text=outcome.problem, seconds=outcome.seconds)
        if state == "fails" and not still_answers(device):
            return
    emit("finished")


def state_of(check: KernelCheck, outcome: CheckOutcome) -> str:
    """See `service.doctor.CheckResult`."""
    if not outcome.ran:
        return "unavailable"
    if outcome.error is None:
        return "fails"
    return "works" if outcome.error <= check.bound else "wrong"


def check_key(check: KernelCheck) -> str:
    """What names a check in a request: the same kernel may be checked on two devices."""
    return f"{check.name} ({check.needs})"


def _tell(
    emit: Emit, check: KernelCheck, state: str, *, error: float | None = None, text: str = "", seconds: float = 0.0
) -> None:
    emit(
        "check",
        key=check_key(check),
        name=check.name,
        device=check.needs,
        state=state,
        # JSON has no infinity: an output that is not finite is as wrong as can be.
        error=None if error is None else min(error, 1e30),
        bound=check.bound,
        text=text,
        instead=check.instead,
        seconds=round(seconds, 3),
    )
