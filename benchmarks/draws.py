"""What drawing the next tokens of a batch costs beside making their scores: 64 rows, on this machine's processor.

Run: python -m benchmarks.draws        (some seconds, nothing else running)
"""

from __future__ import annotations

import statistics
import time

import torch

from benchmarks.report import Row, write
from tenon.infer.requests import Request
from tenon.infer.sampling import Draw, sample, sample_rest

ROWS, TURNS = 64, 7
LIMITS = {"no limits": {}, "top_k 50": {"top_k": 50}, "top_p 0.95": {"top_p": 0.95}, "min_p 0.05": {"min_p": 0.05}}


def main() -> None:
    """Measure and write the file."""
    rows = []
    for vocabulary in (49_152, 128_256):
        logits = 2.5 * torch.randn((ROWS, vocabulary), generator=torch.Generator().manual_seed(0))
        for name, limits in LIMITS.items():
            draws = [Draw(Request((1,), temperature=1.0, seed=n, **limits), n + 1) for n in range(ROWS)]
            taken = [_milliseconds(logits, draws) for _ in range(TURNS + 1)][1:]
            rows.append(Row(f"{ROWS} draws of {vocabulary:,} tokens, {name}", statistics.median(taken), "ms"))
            print(f"{rows[-1].what}: {rows[-1].value:.1f} ms")
    print(write("draws", rows))


def _milliseconds(logits_SV: torch.Tensor, draws: list[Draw]) -> float:
    began = time.perf_counter()
    rest = (~sample(logits_SV, draws).settled_S).nonzero()[:, 0].tolist()
    if rest:
        sample_rest(logits_SV, draws, rest)
    return 1e3 * (time.perf_counter() - began)


if __name__ == "__main__":
    main()
