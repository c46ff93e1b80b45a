"""What works on this machine and what to install: measured here, and by a worker process for all that needs torch.

A kernel that takes its worker with it, or never returns, is one failed check: another worker goes on behind it. This
module does not know screens, nor what is advised (service.advice).
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from typing import Literal

from tenon.errors import RunError, TenonError
from tenon.plan.requests import CheckRequest
from tenon.processes import Event, Worker, start_worker, worker_log
from tenon.runs.machine import MachineRecord, record_machine
from tenon.service.advice import Advice, advise
from tenon.service.disk import DiskSpeed, measure_disk
from tenon.service.environment import require_training
from tenon.service.network import Link, hub_endpoint, measure_loopback, reach_hub
from tenon.settings import Settings
from tenon.values import Value

# A check takes seconds, the first on a GPU up to a minute: its kernels are compiled.
CHECK_SECONDS = 180.0

Take = Callable[[Event], None]


class CheckResult(Value):
    """One kernel or back end on one device.

    state: works; wrong: computes something else than its reference; fails: raises, hangs or kills; unavailable: the GPU
    is too old for it, or a package is missing; absent: no such device here. error: relative, against the reference.
    text: the first line of its failure, or what is missing. instead: what a run uses then.
    """

    name: str
    device: Literal["cpu", "cuda"]
    state: Literal["works", "wrong", "fails", "unavailable", "absent"]
    error: float | None
    bound: float
    text: str
    instead: str
    seconds: float


class DoctorReport(Value):
    """Everything that was found. hub: None when offline, or without the package that asks it."""

    machine: MachineRecord
    checks: tuple[CheckResult, ...]
    disk: DiskSpeed
    loopback: Link
    hub: Link | None
    advice: tuple[Advice, ...]

    @property
    def blocked(self) -> bool:
        """Whether training cannot work as things are."""
        return any(one.blocks for one in self.advice)


def examine(settings: Settings, take: Take, *, check_seconds: float = CHECK_SECONDS) -> DoctorReport:
    """Look at everything; nothing that does not work raises. take: is told the events of what is going on."""
    take({"kind": "phase", "name": "disk", "detail": str(settings.cache)})
    disk = measure_disk(settings.cache)
    take({"kind": "phase", "name": "network", "detail": "loopback"})
    loopback, hub = measure_loopback(), None
    endpoint = "" if settings.offline else hub_endpoint()
    if endpoint:
        take({"kind": "phase", "name": "network", "detail": endpoint})
        hub = reach_hub(endpoint)
    problem: TenonError | None = None
    machine, checks = record_machine(settings.visible_devices), ()
    try:
        require_training()
        take({"kind": "phase", "name": "kernels", "detail": ""})
        examination = _Examination(settings, take, check_seconds)
        examination.run()
        machine, checks = examination.machine or machine, tuple(examination.checks.values())
    except TenonError as error:
        problem = error
    advice = advise(machine, disk=disk, hub=hub, problem=problem, compiler=_has_compiler())
    return DoctorReport(machine=machine, checks=checks, disk=disk, loopback=loopback, hub=hub, advice=advice)


class _Examination:
    """The checks of one look: as many workers as it takes."""

    def __init__(self, settings: Settings, take: Take, check_seconds: float) -> None:
        self._settings, self._take, self._check_seconds = settings, take, check_seconds
        self._running: Event | None = None
        self._finished = False
        self.machine: MachineRecord | None = None
        self.checks: dict[str, CheckResult] = {}

    def run(self) -> None:
        """Until every check has its result. Raises what a worker raised that ran no check at all."""
        while not self._finished:
            before = len(self.checks)
            try:
                self._one_worker()
            except RunError as error:
                if self._running is None:
                    raise
                self._failed(self._running, f"{error.what}{f' ({error.got})' if error.got else ''}")
            if len(self.checks) == before and not self._finished:
                return

    def _one_worker(self) -> None:
        log = worker_log("check", self._settings)
        worker = start_worker("check", None, settings=self._settings, log=log)
        self._running = None
        watchdog = _Watchdog(worker, self._check_seconds)
        try:
            worker.send(CheckRequest(done=tuple(self.checks)))
            for event in worker.events():
                watchdog.feed()
                self._hear(event)
            if watchdog.bit and self._running is not None:
                text = f"it did not return within {self._check_seconds:g} s"
                self._failed(self._running, text, seconds=self._check_seconds)
            else:
                worker.finish()
                log.unlink(missing_ok=True)
        finally:
            watchdog.stop()
            worker.kill()

    def _hear(self, event: Event) -> None:
        kind = event["kind"]
        if kind == "machine":
            self.machine = MachineRecord.model_validate(event["machine"])
        elif kind == "progress":
            self._running = event
            self._take(event)
        elif kind == "check":
            self._running = None
            fields = {name: event[name] for name in CheckResult.model_fields}
            self.checks[str(event["key"])] = CheckResult.model_validate(fields)
        elif kind == "finished":
            self._finished = True

    def _failed(self, running: Event, text: str, *, seconds: float = 0.0) -> None:
        """The check that ended its worker, from its `progress` event."""
        self._running = None
        self.checks[str(running["key"])] = CheckResult(
            name=str(running["what"]),
            device=running["device"],
            state="fails",
            error=None,
            bound=float(running["bound"]),
            text=text,
            instead=str(running["instead"]),
            seconds=seconds,
        )


class _Watchdog:
    """Kills a worker that says nothing for too long."""

    def __init__(self, worker: Worker, patience_seconds: float) -> None:
        self._worker, self._patience_seconds = worker, patience_seconds
        self._timer: threading.Timer | None = None
        self.bit = False
        self.feed()

    def feed(self) -> None:
        """The worker has said something."""
        self.stop()
        self._timer = threading.Timer(self._patience_seconds, self._bite)
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        """No longer watch."""
        if self._timer is not None:
            self._timer.cancel()

    def _bite(self) -> None:
        self.bit = True
        self._worker.kill()


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in ("cc", "gcc", "clang"))
