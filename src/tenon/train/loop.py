"""The loop: it only sequences. Take each slot's window, make the gradient, apply it, report, validate, save.

Invariants:
- nothing that a checkpoint holds changes while a gradient is being made, so a stop may come at any instant of that
time; - every random choice is a function of (seed, slot, step), so the state is cursors, parameters and optimiser
tensors alone; - a non-finite loss or gradient ends the run before it touches a parameter.

This module does not know recipes, data formats, or how validation is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import psutil
import torch

from tenon.adapters.bank import AdapterBank
from tenon.data.pack import PackRow
from tenon.errors import StopRequestedError
from tenon.kernels.gpu_errors import first_line, is_out_of_memory
from tenon.models.decoder import Decoder
from tenon.ranks.group import ALONE, Ranks
from tenon.runs.checkpoints import Checkpoint
from tenon.train.checkpoint import SavedOptions, read_slot_weights, read_state, write_state
from tenon.train.diagnose import not_finite_error
from tenon.train.graph import StepGraphs
from tenon.train.interrupt import StopNow, StopSignal
from tenon.train.memory import AS_PLANNED, StepMemory
from tenon.train.proof import describe_path, prove
from tenon.train.slot import SlotTraining
from tenon.train.step import StepOptions, WindowLoss, accumulate_window, add_up, is_finite

_MIN_LOSS_SCALE = 1.0


class Emit(Protocol):
    """Writes one event of the run."""

    def __call__(self, kind: str, /, **fields: str | float | bool | None) -> object: ...


class Checkpoints(Protocol):
    """What the loop asks of checkpoints (see `runs.checkpoints.CheckpointStore`)."""

    def newest(self) -> Checkpoint | None: ...

    def write(self, step: int, writer: Callable[[Path], None], /) -> object: ...

    def mark_best(self, step: int, slot: str, /) -> None: ...

    def best(self, slot: str, /) -> Checkpoint | None: ...


@dataclass(frozen=True, slots=True)
class Validation:
    """What a validation found: all metrics, the one that decides, and its direction."""

    metrics: dict[str, float]
    value: float
    higher_is_better: bool


@dataclass(frozen=True, slots=True)
class RunPorts:
    """What the loop needs of the outside: events, checkpoints, validation of a slot (None: no rows for it), stop.

    base: what adapter files name as their base. ranks: the processes that take these steps together; events,
    checkpoints and validations are the same on all of them, however they come about. memory: how steps are to be made.
    """

    emit: Emit
    checkpoints: Checkpoints
    validate: Callable[[SlotTraining], Validation | None]
    stop: StopSignal
    base: str
    ranks: Ranks = ALONE
    memory: StepMemory = AS_PLANNED


class Trainer:
    """Trains the slots of one run over one decoder."""

    def __init__(
        self,
        decoder: Decoder,
        bank: AdapterBank,
        slots: Sequence[SlotTraining],
        *,
        options: StepOptions,
        checkpoint_every: int,
        ports: RunPorts,
    ) -> None:
        """checkpoint_every: steps between checkpoints, 0 for only at the end and at stops."""
        self._decoder, self._bank, self._slots = decoder, bank, slots
        self._options, self._every, self._ports = options, checkpoint_every, ports
        self._saved: object = None
        self._path, self._path_on = "" if decoder.is_fast else "plain", describe_path(decoder.device)
        self._graphs = StepGraphs(decoder, on_failure=self._without_graphs)
        self._told_attention = False

    def _without_graphs(self, reason: str) -> None:
        text = f"small batches are launched kernel by kernel, no CUDA graph could be recorded: {reason}"
        self._ports.emit("warning", code="train-graphs", text=text)

    def _tell_attention(self) -> None:
        """Say once that attention is slower than it could be on this GPU."""
        problem = self._decoder.attention_problem
        if self._told_attention or not problem:
            return
        self._told_attention = True
        text = f"attention is torch's, which is slower on this GPU than cuDNN's; that one cannot be used: {problem}"
        self._ports.emit("warning", code="train-attention-slow", text=text)

    @property
    def step(self) -> int:
        """Steps done by the slot that has done most."""
        return max(t.cursor.step for t in self._slots)

    def resume(self) -> int:
        """Take up the newest whole checkpoint; returns its step, 0 when there is none."""
        found = self._ports.checkpoints.newest()
        if found is None:
            return 0
        saved = read_state(found.folder, self._slots)
        self._options = replace(self._options, loss_scale=saved.loss_scale, micro_tokens=saved.micro_tokens)
        if saved.path and saved.path_on == self._path_on:
            # What was found once on such a machine is not asked again: another answer would change the bits.
            self._take_path(saved.path)
        self._saved = self._state()
        for t in self._slots:
            # The mark is written after its checkpoint; a kill between the two is mended here.
            if t.best is not None and t.best.step == t.cursor.step:
                self._ports.checkpoints.mark_best(found.step, t.plan.name)
        return found.step

    def run(self) -> None:
        """Train to the end and leave a final checkpoint.

        Raises StopRequestedError (state saved) when asked to stop, TrainError train-not-finite, train-memory, RunError
        run-disk-full.
        """
        try:
            self._validate()
            self._options = self._ports.memory.settle(self._options)
            while any(not t.ended for t in self._slots):
                self._train_step()
                self._validate()
                if self._every and self.step % self._every == 0:
                    self._save()
            self._save()
        except StopNow:
            self._ports.stop.settle()
            self._save()
            self._ports.emit("stopped", step=self.step)
            raise StopRequestedError(
                "run-stopped", f"the run was asked to stop; step {self.step} is saved", hint="tenon resume RUN"
            ) from None

    def _train_step(self) -> None:
        started = time.monotonic()
        windows = {t.number: t.window() for t in self._slots}
        active = [t for t in self._slots if windows[t.number]]
        rows = [row for window in windows.values() for row in window]
        if not rows:
            return
        data_seconds = time.monotonic() - started
        started += self._prove(rows)
        losses = self._gradient(active, rows)
        self._tell_attention()
        norms = {t.number: t.optimizer.clip() for t in active}
        self._require_finite(active, rows, losses, norms)
        factors = {t.number: t.learning_factor() for t in active}
        for t in active:
            t.optimizer.step(factors[t.number])
        # One time for all ranks: limits and schedules may follow it.
        (seconds,) = self._ports.ranks.largest(time.monotonic() - started)
        for t in active:
            t.advance(seconds)
            self._report(t, losses[t.number], norms[t.number], factors[t.number], seconds, data_seconds)

    def _prove(self, rows: Sequence[PackRow]) -> float:
        """Before the first update, hold the fast path against plain torch; a run whose fast path fails goes on without.

        Returns the seconds that it took, which no step counts.
        """
        if self._path:
            return 0.0
        found = prove(self._decoder, self._bank, rows, self._options, stop=self._ports.stop, ranks=self._ports.ranks)
        self._ports.emit("proof", **found.fields())
        self._take_path("fast" if found.verdict != "fails" else "plain base" if found.base else "plain")
        if found.verdict == "fails":
            text = f"fused kernels are not used: on the run's first rows they differ from plain torch: {found.problem}"
            self._ports.emit("warning", code="train-fast-path", text=text)
        elif found.verdict == "unknown":
            text = f"fused kernels could not be held against plain torch: {found.problem}"
            self._ports.emit("warning", code="train-fast-path", text=text)
        return found.seconds

    def _take_path(self, path: str) -> None:
        """See `SavedOptions.path`."""
        self._path = path
        if path != "fast" and self._decoder.is_fast:
            self._decoder.use_plain(base=path == "plain base")

    def _gradient(self, active: Sequence[SlotTraining], rows: Sequence[PackRow]) -> dict[int, WindowLoss]:
        """The window's gradient, unscaled. In fp16 an overflow halves the scale and the window is made again."""
        while True:
            losses = add_up(
                self._accumulate(active, rows), [t.optimizer.gradients_P for t in active], self._ports.ranks
            )
            scale = self._options.loss_scale
            overflow = scale > _MIN_LOSS_SCALE and not all(t.optimizer.is_finite() for t in active)
            if not overflow:
                for t in active if scale != 1.0 else ():
                    t.optimizer.unscale(scale)
                return losses
            self._options = replace(self._options, loss_scale=scale / 2)
            self._ports.emit("warning", code="train-loss-scale", text=f"fp16 overflow: loss scale is now {scale / 2:g}")

    def _accumulate(self, active: Sequence[SlotTraining], rows: Sequence[PackRow]) -> dict[int, WindowLoss]:
        """This rank's share of the window's gradient. Where memory runs out it is made again with less."""
        while True:
            for t in active:
                t.optimizer.zero()
            try:
                with self._ports.stop.interruptible():
                    return accumulate_window(
                        self._decoder, self._bank, rows, self._options, ranks=self._ports.ranks, graphs=self._graphs
                    )
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            # Here, not above: as long as the exception lives, it holds all that the batch had made.
            self._graphs.forget()
            self._options = self._ports.memory.tighten(self._options, step=self.step + 1, reason=reason)

    def _require_finite(
        self,
        active: Sequence[SlotTraining],
        rows: Sequence[PackRow],
        losses: dict[int, WindowLoss],
        norms: dict[int, float],
    ) -> None:
        for t in active:
            if not is_finite(losses[t.number].loss, norms[t.number]):
                mine = [row for row in rows if row.slot == t.number]
                raise not_finite_error(self._decoder, self._bank, t, mine, losses[t.number].loss)

    def _report(
        self, t: SlotTraining, loss: WindowLoss, norm: float, factor: float, seconds: float, data_seconds: float
    ) -> None:
        """data_seconds: how much of the step's `seconds` was spent waiting for its rows."""
        left = t.cursor.seconds * (1 - t.progress) / t.progress if t.progress > 0 else 0.0
        self._ports.emit(
            "step",
            slot=t.plan.name,
            step=t.cursor.step,
            steps=t.steps,
            loss=loss.loss,
            lr=t.plan.optimizer.lr * factor,
            tokens=loss.tokens,
            supervised_tokens=loss.supervised_tokens,
            rows=loss.rows,
            tokens_per_second=loss.tokens / max(seconds, 1e-9),
            grad_norm=norm,
            memory_bytes=_memory_bytes(self._decoder.device),
            progress=t.progress,
            seconds=seconds,
            data_seconds=data_seconds,
            seconds_left=left,
        )

    def _validate(self) -> None:
        """Validate every slot that is due; one checkpoint holds all that are at their best."""
        improved: list[SlotTraining] = []
        for t in self._slots:
            if not t.validation_due:
                continue
            with self._ports.stop.interruptible():
                found = self._ports.validate(t)
            if found is None:
                t.validated = t.cursor.step
                continue
            is_best = t.judge(found.value, higher_is_better=found.higher_is_better)
            self._ports.emit("validation", slot=t.plan.name, step=t.cursor.step, best=is_best, **found.metrics)
            if is_best:
                improved.append(t)
        if improved:
            self._save()
        for t in improved:
            self._ports.checkpoints.mark_best(self.step, t.plan.name)

    def _state(self) -> object:
        """What changes whenever anything that a checkpoint holds changes."""
        return (
            self._options.loss_scale,
            self._options.micro_tokens,
            self._path,
            [(t.cursor, t.best, t.validated, t.ended) for t in self._slots],
        )

    def _save(self) -> None:
        """Write the state of all slots, unless it is saved already."""
        if self._saved == self._state():
            return

        def write(folder: Path) -> None:
            options = SavedOptions(
                self._options.loss_scale, self._options.micro_tokens, self._path, self._path_on if self._path else ""
            )
            write_state(folder, self._slots, base=self._ports.base, options=options)

        self._ports.checkpoints.write(self.step, write)
        self._saved = self._state()
        self._ports.emit("checkpoint", step=self.step)

    def take_best(self, t: SlotTraining) -> int:
        """Give a slot the weights of its best validation, when early stopping asked for it; returns their step."""
        best = self._ports.checkpoints.best(t.plan.name) if t.plan.validation.patience else None
        if best is None:
            return t.cursor.step
        read_slot_weights(best.folder, t)
        return best.step


def _memory_bytes(device: torch.device) -> int:
    """Peak memory of the GPU's allocator, or what the process holds on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
