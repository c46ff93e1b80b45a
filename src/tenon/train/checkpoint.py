"""What a checkpoint holds: for each slot its adapter in PEFT's layout, its optimiser's tensors, and where it stands.

    <slot name>/adapter_config.json, adapter_model.safetensors, optimizer.safetensors
    state.json

Everything else that a step depends on (row order, dropout, learning rate) is a function of the plan and the cursors.
This module does not know how a checkpoint becomes complete or absent: see runs.checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tenon.adapters.peft_files import fill_slot, read_adapter, write_adapter
from tenon.errors import RunError
from tenon.train.slot import Best, SlotTraining
from tenon.train.windows import Cursor

STATE_NAME = "state.json"
OPTIMIZER_NAME = "optimizer.safetensors"


@dataclass(frozen=True, slots=True)
class SavedOptions:
    """What may have changed since the plan, and decides the bits of the steps that follow.

    path: how the steps were made, after the proof of the fast path ("" before it): `fast`, `plain`, or `plain base`
    where a quantised base's own kernels were wrong. path_on: the GPU and versions that this was found on.
    """

    loss_scale: float
    micro_tokens: int
    path: str = ""
    path_on: str = ""


def write_state(folder: Path, slots: Sequence[SlotTraining], *, base: str, options: SavedOptions) -> None:
    """Write everything that resuming needs into an empty folder."""
    for training in slots:
        target = folder / training.plan.name
        target.mkdir()
        write_adapter(target, training.slot, base=base, rslora=training.plan.lora.rslora)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in training.optimizer.state().items()}
        save_file(tensors, target / OPTIMIZER_NAME)
    state = {
        "version": 1,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **asdict(options),
        "slots": {t.plan.name: _slot_state(t) for t in slots},
    }
    (folder / STATE_NAME).write_text(json.dumps(state, indent=1), encoding="utf-8")


def _slot_state(training: SlotTraining) -> dict[str, Any]:
    best = None if training.best is None else asdict(training.best)
    return {"cursor": asdict(training.cursor), "best": best, "validated": training.validated, "ended": training.ended}


def read_state(folder: Path, slots: Sequence[SlotTraining]) -> SavedOptions:
    """Bring every slot to where the checkpoint was written. Raises RunError run-checkpoint."""
    state = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
    names = sorted(t.plan.name for t in slots)
    if sorted(state["slots"]) != names:
        raise RunError(
            "run-checkpoint",
            f"{folder} holds the slots {', '.join(sorted(state['slots']))}, the plan has {', '.join(names)}",
            hint="plan.json and the checkpoints do not belong together; start a new run",
        )
    for training in slots:
        own = state["slots"][training.plan.name]
        read_slot_weights(folder, training)
        _read_optimizer(folder / training.plan.name / OPTIMIZER_NAME, training)
        training.cursor = Cursor(**own["cursor"])
        training.best = Best(**own["best"]) if own["best"] else None
        training.validated, training.ended = own["validated"], own["ended"]
    # A checkpoint from before a proof has no path, nor has one of an earlier version.
    path, path_on = str(state.get("path", "")), str(state.get("path_on", ""))
    return SavedOptions(float(state["loss_scale"]), int(state["micro_tokens"]), path, path_on)


def _read_optimizer(path: Path, training: SlotTraining) -> None:
    try:
        training.optimizer.load_state(load_file(path))
    except ValueError as error:
        raise RunError(
            "run-checkpoint",
            f"{path} does not fit the slot {training.plan.name}",
            got=str(error),
            hint="it was written by another version or for other ranks; start a new run",
        ) from error


def read_slot_weights(folder: Path, training: SlotTraining) -> None:
    """Only the adapter of one slot, for taking the best of a run."""
    fill_slot(training.slot, read_adapter(folder / training.plan.name))
