"""The works of `gpu_ranks` as data: what several GPUs do together, and beside it what one does alone.

This module measures nothing and imports nothing heavy.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from benchmarks.gpu.works import SHAPES, Shape

QWEN_32B = Shape("32B", 64, 5120, 40, 8, 27648, 152064, tied_head=False)  # Qwen2.5-32B
TINY = Shape("tiny", 4, 64, 4, 2, 96, 97, tied_head=False)  # to try the script on a CPU


@dataclass(frozen=True, slots=True)
class RanksWork:
    """One call of torchrun. rows: of a step, whoever computes it. batch_rows: computed at once by one device.

    spread: every device keeps a part of every layer, and none could do the work alone; otherwise each has the whole
    base, and the same steps are taken by one device too, in turns. at_least: times one device's tokens a second.
    recompute: every layer is computed again on the way back.
    """

    name: str
    shape: Shape
    rows: int
    row_tokens: int
    batch_rows: int
    spread: bool
    steps: int
    recompute: bool = False
    warm: int = 3
    rank: int = 16
    repeat: int = 3
    device: str = "cuda"
    at_least: float | None = None

    @property
    def title(self) -> str:
        """The work in words."""
        how = "base spread over the GPUs" if self.spread else "data parallel"
        return f"{self.shape.title} {self.rows} x {self.row_tokens:,} bf16, {how}"

    def to_json(self) -> str:
        """For the command line of the processes that measure."""
        return json.dumps(asdict(self))


def parse_work(text: str) -> RanksWork:
    """Inverse of `RanksWork.to_json`."""
    tree = json.loads(text)
    return RanksWork(**{**tree, "shape": Shape(**tree["shape"])})


# Rows of a step are as many for one GPU as for two: the same optimiser step, in half the time or not.
WORKS = (
    RanksWork("8b", SHAPES["8b"], 8, 2048, 4, spread=False, steps=6, at_least=1.9),
    RanksWork("8b-short", SHAPES["8b"], 4, 2048, 4, spread=False, steps=6, repeat=2),
    RanksWork("32b", QWEN_32B, 8, 2048, 4, spread=True, steps=4, recompute=True, repeat=2),
)
TRIALS = (
    RanksWork("tiny", TINY, 4, 16, 2, spread=False, steps=2, warm=1, repeat=1, device="cpu"),
    RanksWork("tiny-spread", TINY, 4, 16, 2, spread=True, steps=2, warm=1, repeat=1, recompute=True, device="cpu"),
)
