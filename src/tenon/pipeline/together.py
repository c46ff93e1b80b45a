"""A run of several ranks beside the loop: how they meet, and what the first of them does for all.

The first rank alone writes: events, checkpoints, results. This module does not know how ranks talk (ranks) nor what a
step is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from tenon.errors import PlanError, TenonError
from tenon.plan.values import Plan
from tenon.ranks.group import ALONE, Ranks, join, rank_lost
from tenon.runs.checkpoints import Checkpoint, CheckpointStore, Manifest, checkpoint_name, verify_folder
from tenon.runs.events import Scalar
from tenon.runs.folder import RunFolder
from tenon.runs.telemetry import end_as_failed
from tenon.settings import Settings


def meet(run: RunFolder, plan: Plan, settings: Settings) -> Ranks:
    """The ranks of this run, when all are there; one process is alone.

    Raises PlanError plan-device-missing, TrainError train-rank-lost.
    """
    if settings.ranks == 1:
        return ALONE
    if plan.machine.device == "cuda":
        require_gpus(settings.ranks)
    host, _, port = settings.rendezvous.rpartition(":")
    try:
        store = dist.TCPStore(host, int(port), is_master=False)  # pyright: ignore[reportPrivateImportUsage]
    except (RuntimeError, ValueError) as error:
        raise rank_lost("the ranks of this run did not find each other", got=str(error)[:200]) from error

    def on_lost(error: TenonError) -> None:
        if settings.rank == 0:
            end_as_failed(run.events, error)
        os._exit(error.exit_status)

    kind = plan.machine.device
    device = torch.device(kind, settings.rank) if kind == "cuda" else torch.device(kind)
    return join(store, settings.rank, settings.ranks, device=device, on_lost=on_lost)


def require_gpus(count: int) -> None:
    """Raise PlanError plan-device-missing when there are fewer GPUs here."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < count:
        raise PlanError(
            "plan-device-missing",
            f"the run is to use {count} GPUs, and torch finds {found} here",
            hint=f"tenon resume RUN --devices {found}" if found else "run on a machine with a GPU, or plan device=cpu",
        )


def silent(_kind: str, /, **_fields: Scalar) -> None:
    """Takes the events of every rank but the first, which tells them for all."""


class SharedCheckpoints:
    """The checkpoints of a run as its ranks have them (see `train.loop.Checkpoints`): the first writes, all read."""

    def __init__(self, store: CheckpointStore, ranks: Ranks) -> None:
        self._store, self._ranks = store, ranks

    def newest(self) -> Checkpoint | None:
        """The one that the first rank finds whole."""
        return self._told(lambda: self._store.newest())

    def write(self, step: int, writer: Callable[[Path], None]) -> None:
        """Write it; the others wait, so that none of them ends the company before it is done."""

        def write() -> None:
            self._store.write(step, writer)

        self._ranks.first_finds(write)

    def mark_best(self, step: int, slot: str) -> None:
        """See `CheckpointStore.mark_best`."""
        if self._ranks.first:
            self._store.mark_best(step, slot)

    def best(self, slot: str) -> Checkpoint | None:
        """The one that the first rank finds marked and whole."""
        return self._told(lambda: self._store.best(slot))

    def _told(self, find: Callable[[], Checkpoint | None]) -> Checkpoint | None:
        found: list[Checkpoint] = []

        def step_of() -> int | None:
            checkpoint = find()
            found.extend([checkpoint] if checkpoint else [])
            return checkpoint.step if checkpoint else None

        step = self._ranks.first_finds(step_of)
        if step is None or found:
            return found[0] if found else None
        folder = self._store.folder / checkpoint_name(step)
        manifest = verify_folder(folder, hashes=False)
        if not isinstance(manifest, Manifest):
            raise rank_lost(f"{folder} is not what the first rank sees there", got=manifest)
        return Checkpoint(step, folder, manifest)
