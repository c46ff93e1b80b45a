"""Twenty steps whose losses are known for each kind of GPU: `python -m tests.gpu.golden` writes those of this one.

Everything in them is a function of seeds, so one device gives one set of bits as long as torch and Triton stay the
same; with others the losses are near. The file says what it was made with.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tenon.data.pack import PackRow
from tenon.models.frozen import FrozenKind
from tenon.plan.values import OptimizerPlan
from tenon.train.optimizers import SlotOptimizer
from tenon.train.step import StepOptions, accumulate_window
from tests.gpu.small import VOCAB, small_bank, small_decoder, small_facts

FOLDER = Path(__file__).parent / "golden"
STEPS = 20
ADAMW = OptimizerPlan(
    kind="adamw",
    lr=1e-3,
    b_ratio=1.0,
    weight_decay=0.01,
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    momentum=0.9,
    clip_norm=1.0,
)


@dataclass(frozen=True)
class Golden:
    """kind: what the base is kept in. ranks: of the slots. lengths: of each slot's rows in a step."""

    kind: FrozenKind = "dense"
    ranks: Sequence[int] = (16,)
    lengths: Sequence[int] = (200, 64, 31)
    drop: float = 0.0
    ride: bool = False


RUNS = {
    "one slot": Golden(),
    "one slot in the borders": Golden(lengths=(1024, 1100), ride=True),
    "four slots, dropout": Golden(ranks=(16, 5, 48, 8), drop=0.1),
    "fp8": Golden("fp8"),
    "int8": Golden("int8"),
    "nf4": Golden("nf4"),
}


def rows_of(run: Golden, step: int) -> list[PackRow]:
    """Rows that can be learnt: each token follows from the one before it."""
    draw = np.random.default_rng(step)
    rows = []
    for slot in range(len(run.ranks)):
        for index, length in enumerate(run.lengths):
            ids = (int(draw.integers(1, VOCAB)) + 7 * (slot + 1) * np.arange(length)) % (VOCAB - 1) + 1
            rows.append(PackRow(slot, ids, np.arange(length) > 1, index, draw=97 * step + index))
    return rows


def golden_run(run: Golden, device: torch.device) -> dict[str, Any]:
    """The losses of all slots, step by step, and a hash of the last weights' bits."""
    facts = small_facts()
    decoder = small_decoder(
        facts, torch.bfloat16, device, fuse=True, kind=run.kind, ride_rank=run.ranks[0] if run.ride else 0
    )
    bank = small_bank(facts, torch.bfloat16, device, run.ranks, drop=run.drop)
    optimizers = [SlotOptimizer(slot, ADAMW) for slot in bank.slots.values()]
    losses = []
    for step in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero()
        found = accumulate_window(decoder, bank, rows_of(run, step), StepOptions(16_384, False))
        for optimizer in optimizers:
            optimizer.clip()
            optimizer.step(1.0)
        losses.append([found[number].loss for number in sorted(found)])
    digest = hashlib.sha256()
    for slot in bank.slots.values():
        digest.update(slot.parameters_P.cpu().numpy().tobytes())
    return {"losses": losses, "weights": digest.hexdigest()[:16]}


def versions() -> dict[str, str]:
    """What decides the bits beside the device."""
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__}


def golden_file(folder: Path = FOLDER) -> Path:
    """The file of this kind of GPU."""
    name = torch.cuda.get_device_name().lower().replace("nvidia", "").strip()
    return folder / f"{'-'.join(name.split())}.json"


def main(words: Sequence[str]) -> int:
    """Write this device's file."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.golden", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to write it")
    folder = parser.parse_args(words).folder
    device = torch.device("cuda")
    tree = {
        "device": torch.cuda.get_device_name(),
        "date": date.today().isoformat(),
        "versions": versions(),
        "runs": {name: golden_run(run, device) for name, run in RUNS.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = golden_file(folder)
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
