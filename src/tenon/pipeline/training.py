"""The story of a run: find the base, read the data, train the slots, judge them against the base, register them.

Each part hands over values and files; whatever ends the run at any point, `tenon resume` picks it up where it was.
This module only sequences.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tenon.adapters.bank import SiteShape, SlotShape, initialise
from tenon.adapters.peft_files import fill_slot, read_adapter
from tenon.data.order import RowOrder
from tenon.errors import StopRequestedError, TenonError
from tenon.kernels.gpu_errors import gpu_errors
from tenon.pipeline.base import find_base
from tenon.pipeline.engine import Workbench, load_workbench
from tenon.pipeline.finish import finish_slot
from tenon.pipeline.gpu_watch import gpu_telemetry, note_machine
from tenon.pipeline.slot_data import SlotData, open_slot_data
from tenon.pipeline.validation import Validator
from tenon.plan.values import LoraPlan, Plan, SlotPlan
from tenon.runs.events import Broadcast
from tenon.runs.folder import RunFolder
from tenon.runs.trackers import open_trackers
from tenon.settings import Settings
from tenon.train.interrupt import StopNow, StopSignal
from tenon.train.loop import RunPorts, Trainer
from tenon.train.optimizers import SlotOptimizer
from tenon.train.slot import SlotTraining
from tenon.train.step import StepOptions
from tenon.train.windows import WindowFeed
from tenon.values import canonical_json

# fp16 gradients underflow without it; halved whenever it overflows.
_FP16_LOSS_SCALE = 65536.0


def train(run_folder: Path, settings: Settings) -> None:
    """Do, or go on with, the run of a folder. Raises StopRequestedError when it was stopped and saved."""
    run = RunFolder.open(run_folder)
    plan = Plan.from_json(run.plan_json())
    with run.lock():
        telemetry = gpu_telemetry(run, plan, settings)
        trackers = open_trackers(plan.trackers, run, offline=settings.offline)
        emit = Broadcast(run.events, [*trackers, telemetry])
        stop = StopSignal()
        try:
            with stop.listening(), telemetry.sampling(), gpu_errors(resume=f"tenon resume {run_folder}"):
                _work(run, plan, settings, emit, stop)
        except StopNow:
            emit.emit("stopped")
            raise StopRequestedError(
                "run-stopped", "stopped; everything done so far is saved", hint=f"tenon resume {run_folder}"
            ) from None
        except StopRequestedError:
            raise
        except TenonError as error:
            emit.emit("failed", code=error.code, text=error.what)
            raise
        finally:
            emit.close()


def _work(run: RunFolder, plan: Plan, settings: Settings, events: Broadcast, stop: StopSignal) -> None:
    emit = events.emit
    newest = run.checkpoints.newest()
    emit("resume", step=newest.step) if newest else emit("start")
    started = time.monotonic()
    note_machine(run, plan, settings)
    with ExitStack() as open_data:
        with stop.interruptible():
            emit("phase", name="base", detail=plan.base.spec)
            folder = find_base(plan.base, settings)
            emit("phase", name="data", detail=f"{len(plan.slots)} slots" if len(plan.slots) > 1 else "")
            data = [open_data.enter_context(open_slot_data(slot, folder, settings, emit)) for slot in plan.slots]
            _write_reports(run, plan.slots, data)
            bench = load_workbench(
                folder,
                plan.base,
                plan.machine,
                plan.precision,
                frozen=plan.frozen,
                ride_rank=plan.slots[0].lora.rank if len(plan.slots) == 1 else 0,
            )
        slots = [_make_slot(bench, slot, own) for slot, own in zip(plan.slots, data, strict=True)]
        trainer = _make_trainer(run, plan, bench, slots, data, events, stop)
        trainer.resume()
        emit("phase", name="train", detail=", ".join(slot.name for slot in plan.slots))
        trainer.run()
        for training, own in zip(slots, data, strict=True):
            with stop.interruptible():
                trainer.take_best(training)
                finish_slot(run, plan, training, own, bench, settings, emit)
    emit("finished", seconds=time.monotonic() - started)


def _write_reports(run: RunFolder, slots: Sequence[SlotPlan], data: Sequence[SlotData]) -> None:
    reports = {slot.name: own.dataset.report.model_dump(mode="json") for slot, own in zip(slots, data, strict=True)}
    run.write_data_report(canonical_json(reports))


def _make_slot(bench: Workbench, plan: SlotPlan, data: SlotData) -> SlotTraining:
    """The slot in the bank, at its start, with its rows and its optimiser."""
    number = bench.bank.add(plan.name, _shape(plan.lora), trained=True)
    slot = bench.bank.slots[number]
    if plan.lora.start_from is None:
        initialise(slot, plan.lora.init, plan.seed)
    else:
        fill_slot(slot, read_adapter(Path(plan.lora.start_from)))
    rows = data.dataset.train
    order = RowOrder(rows.sizes, data.dataset.weights, seed=plan.data.seed, shuffle=plan.data.shuffle)
    feed = WindowFeed(order, plan.batch, plan.limits, rows.length)
    return SlotTraining(number, plan, slot, feed, rows, SlotOptimizer(slot, plan.optimizer))


def _shape(lora: LoraPlan) -> SlotShape:
    return SlotShape({site: SiteShape(lora.rank, lora.scale) for site in lora.sites}, lora.dropout)


def _make_trainer(
    run: RunFolder,
    plan: Plan,
    bench: Workbench,
    slots: Sequence[SlotTraining],
    data: Sequence[SlotData],
    events: Broadcast,
    stop: StopSignal,
) -> Trainer:
    validator = Validator(bench, {t.number: own for t, own in zip(slots, data, strict=True)}, plan.base.base_hash)
    scale = _FP16_LOSS_SCALE if plan.precision == "fp16" else 1.0
    return Trainer(
        bench.decoder,
        bench.bank,
        slots,
        options=StepOptions(plan.micro_tokens, plan.share_prefix, plan.recompute, scale),
        checkpoint_every=plan.checkpoint.every,
        ports=RunPorts(events.emit, run.checkpoints, validator, stop, plan.base.spec),
    )
