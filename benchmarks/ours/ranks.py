"""One of the processes that measure steps of several GPUs; torchrun starts them: `-m benchmarks.ours.ranks WORK`.

The first rank prints one line `RESULT {…}`. A step is timed whole on every rank, from rows on the host to updated
adapters, all devices idle before and after; the slowest rank's time counts. This module does not know bounds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.ranks import RanksWork, parse_work
from benchmarks.gpu.rows import drawn_window
from benchmarks.ours.contact import Stepper, facts_of, make_bank, random_decoder, step_options
from benchmarks.ours.step import deal
from tenon.data.pack import PackRow
from tenon.models.layer import Keep
from tenon.models.shards import Sharing
from tenon.ranks.group import ALONE, Ranks, join
from tenon.settings import read_settings


class NeverStops:
    """Nobody asks a measurement to stop."""

    pending = False

    def now(self) -> None:
        """Not asked for."""


def measure(work: RanksWork, ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """Seconds of each step, by who took it; memory of the fullest device; the last loss."""
    began = time.perf_counter()
    windows = [
        deal(drawn_window(step, work.rows, work.row_tokens, work.shape.vocab), 1)
        for step in range(work.warm + work.steps)
    ]
    sharing = Sharing(ranks, NeverStops()) if work.spread else None
    decoder = random_decoder(
        facts_of(work.shape), "bf16", device, ride_rank=0 if work.spread else work.rank, sharing=sharing
    )
    keep = (Keep.INPUT,) * work.shape.layers if work.recompute else ()
    options = step_options(work.batch_rows * work.row_tokens, keep)

    def stepper(company: Ranks) -> Callable[[Sequence[PackRow]], float]:
        made = Stepper(decoder, make_bank(decoder, [work.rank], [0]), {0: 1e-4}, options, ranks=company)

        def step(rows: Sequence[PackRow]) -> float:
            (loss,) = made.gradient(rows).values()
            made.update()
            return loss.loss

        return step

    ways = {"together": (stepper(ranks), True)}
    if not work.spread:
        ways = {"alone": (stepper(ALONE), ranks.first), **ways}
    ranks.largest(0.0)
    found: dict[str, Any] = {"load_s": round(time.perf_counter() - began, 2)}
    for turn in range(work.repeat):
        for name, (step, takes_part) in ways.items():
            # Kernels are compiled in the first turn alone.
            taken = windows if turn == 0 else windows[work.warm - 1 :]
            seconds, loss = timed(step if takes_part else None, taken, ranks, device)
            found.setdefault(name, []).append([round(s, 5) for s in seconds[-work.steps :]])
            found["first_s"] = found.get("first_s", round(seconds[0], 3))
            found["loss"] = round(loss, 4)
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    found["peak_gb"] = round(ranks.largest(peak)[0], 3)
    found["gpus"] = ranks.count
    return found


def timed(
    step: Callable[[Sequence[PackRow]], float] | None,
    windows: Sequence[Sequence[PackRow]],
    ranks: Ranks,
    device: torch.device,
) -> tuple[list[float], float]:
    """The slowest rank's seconds for each window, and the last loss. step None: this rank only waits."""
    seconds, loss = [], 0.0
    for rows in windows:
        ranks.largest(0.0)
        began = time.perf_counter()
        if step is not None:
            loss = step(rows)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        seconds.append(ranks.largest(time.perf_counter() - began if step is not None else 0.0)[0])
    return seconds, ranks.largest(loss)[0]


def main() -> None:
    """Measure what the command line says."""
    work, settings = parse_work(sys.argv[1]), read_settings()
    device = torch.device(work.device, settings.rank) if work.device == "cuda" else torch.device(work.device)
    host, _, port = settings.rendezvous.rpartition(":")
    store = dist.TCPStore(host, int(port), is_master=False)  # pyright: ignore[reportPrivateImportUsage]
    ranks = join(store, settings.rank, settings.ranks, device=device, on_lost=lambda _error: os._exit(1))
    try:
        result = measure(work, ranks, device)
        if ranks.first:
            print("RESULT " + json.dumps(result), flush=True)
        ranks.leave()
    finally:
        ranks.close()


if __name__ == "__main__":
    main()
