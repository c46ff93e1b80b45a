"""The story of a run: find the base, read the data, train the slots, judge them against the base, register them.

Each part hands over values and files; whatever ends the run at any point, `tenon resume` picks it up where it was.
This module only sequences.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path

from tenon.adapters.bank import SiteShape, SlotShape, initialise
from tenon.adapters.peft_files import fill_slot, read_adapter
from tenon.data.order import RowOrder
from tenon.errors import StopRequestedError, TenonError
from tenon.kernels.gpu_errors import gpu_errors
from tenon.models.shards import Sharing
from tenon.pipeline.base import find_base
from tenon.pipeline.engine import Workbench, load_workbench
from tenon.pipeline.finish import finish_slot
from tenon.pipeline.gpu_watch import gpu_telemetry, note_machine
from tenon.pipeline.slot_data import Emit, SlotData, open_slot_data
from tenon.pipeline.step_memory import step_memory
from tenon.pipeline.together import SharedCheckpoints, meet, silent
from tenon.pipeline.validation import Validator
from tenon.plan.values import LoraPlan, Plan, SlotPlan
from tenon.ranks.group import Ranks
from tenon.runs.events import Broadcast
from tenon.runs.folder import RunFolder
from tenon.runs.trackers import open_trackers
from tenon.settings import Settings
from tenon.train.interrupt import StopNow, StopSignal
from tenon.train.loop import RunPorts, Trainer
from tenon.train.memory import layer_keeps, memory_errors
from tenon.train.optimizers import SlotOptimizer
from tenon.train.slot import SlotTraining
from tenon.train.step import StepOptions
from tenon.train.windows import WindowFeed
from tenon.values import canonical_json

# fp16 gradients underflow without it; halved whenever it overflows.
_FP16_LOSS_SCALE = 65536.0


def train(run_folder: Path, settings: Settings) -> None:
    """Do, or go on with, the run of a folder, alone or as one of its ranks; the first of them tells what happens.

    Raises StopRequestedError when it was stopped and saved.
    """
    run = RunFolder.open(run_folder)
    plan = Plan.from_json(run.plan_json())
    if settings.rank:
        _take_part(run, plan, settings, silent, nullcontext())
        return
    with run.lock():
        telemetry = gpu_telemetry(run, plan, settings)
        trackers = open_trackers(plan.trackers, run, offline=settings.offline)
        events = Broadcast(run.events, [*trackers, telemetry])
        try:
            _take_part(run, plan, settings, events.emit, telemetry.sampling())
        except StopRequestedError:
            raise
        except TenonError as error:
            events.emit("failed", code=error.code, text=error.what)
            raise
        finally:
            events.close()


def _take_part(
    run: RunFolder, plan: Plan, settings: Settings, emit: Emit, sampling: AbstractContextManager[None]
) -> None:
    """The work of one rank, from meeting the others to the end."""
    ranks = meet(run, plan, settings)
    stop, resume = StopSignal(ranks), f"tenon resume {run.path}"
    # Listening to the end: where one rank is lost the others are told to stop, and that is not what ended the run.
    with stop.listening():
        try:
            with sampling, gpu_errors(resume=resume), memory_errors(resume=resume):
                _work(run, plan, settings, emit, stop, ranks)
        except StopNow:
            stop.settle()
            emit("stopped")
            stopped = StopRequestedError("run-stopped", "stopped; everything done so far is saved", hint=resume)
            ranks.part(stopped)
            raise stopped from None
        except TenonError as error:
            ranks.part(error)
            raise
        finally:
            ranks.close()


def _work(run: RunFolder, plan: Plan, settings: Settings, emit: Emit, stop: StopSignal, ranks: Ranks) -> None:
    newest = SharedCheckpoints(run.checkpoints, ranks).newest()
    emit("resume", step=newest.step, ranks=ranks.count) if newest else emit("start", ranks=ranks.count)
    started = time.monotonic()
    if ranks.first:
        note_machine(run, plan, settings)
    with ExitStack() as open_data:
        with stop.interruptible():
            with ranks.first_goes_first():
                emit("phase", name="base", detail=plan.base.spec)
                folder = find_base(plan.base, settings)
                emit("phase", name="data", detail=f"{len(plan.slots)} slots" if len(plan.slots) > 1 else "")
                data = [open_data.enter_context(open_slot_data(slot, folder, settings, emit)) for slot in plan.slots]
                if ranks.first:
                    _write_reports(run, plan.slots, data)
            bench = _load(plan, folder, stop, ranks)
        # Where ranks hold parts of the base for each other, none may drop its work alone.
        spread = plan.devices.sharded and ranks.count > 1
        stop.at_once = not spread
        slots = [_make_slot(bench, slot, own) for slot, own in zip(plan.slots, data, strict=True)]
        trainer = _make_trainer(run, plan, bench, slots, data, emit, stop, ranks)
        trainer.resume()
        emit("phase", name="train", detail=", ".join(slot.name for slot in plan.slots))
        trainer.run()
        if not spread:
            ranks.leave()
        if not spread and not ranks.first:
            return
        for training, own in zip(slots, data, strict=True):
            with stop.interruptible():
                trainer.take_best(training)
                if ranks.first:
                    finish_slot(run, plan, training, own, bench, settings, emit)
                bench.decoder.walk.follow()
        ranks.leave()
    emit("finished", seconds=time.monotonic() - started)


def _load(plan: Plan, folder: Path, stop: StopSignal, ranks: Ranks) -> Workbench:
    return load_workbench(
        folder,
        plan.base,
        plan.machine,
        plan.precision,
        frozen=plan.frozen,
        ride_rank=plan.slots[0].lora.rank if len(plan.slots) == 1 else 0,
        ranks=ranks,
        sharing=Sharing(ranks, stop) if plan.devices.sharded and ranks.count > 1 else None,
    )


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
    emit: Emit,
    stop: StopSignal,
    ranks: Ranks,
) -> Trainer:
    rows = {t.number: own for t, own in zip(slots, data, strict=True)}
    validator, checkpoints = (
        Validator(bench, rows, plan.base.base_hash, ranks),
        SharedCheckpoints(run.checkpoints, ranks),
    )
    scale = _FP16_LOSS_SCALE if plan.precision == "fp16" else 1.0
    keep = layer_keeps(plan.keeping, plan.base.facts.layers)
    memory = step_memory(plan, bench.decoder, slots, data, emit)
    return Trainer(
        bench.decoder,
        bench.bank,
        slots,
        options=StepOptions(plan.keeping.micro_tokens, plan.share_prefix, keep, scale),
        checkpoint_every=plan.checkpoint.every,
        ports=RunPorts(emit, checkpoints, validator, stop, plan.base.spec, ranks, memory),
    )
