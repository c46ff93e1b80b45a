"""Work done by several processes together, as the ranks of a run are: spawned, each with what it gives back."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tenon.ranks.group import Ranks, join

Work = Callable[..., Any]


def together(
    work: Work, folder: Path, *args: object, count: int = 2, seconds: float = 120, kind: str = "cpu"
) -> list[Any]:
    """What `work(ranks, *args)` gives in each of `count` processes, by rank. Raises when one of them fails.

    kind: cpu, or cuda for a GPU each.
    """
    company = start(work, folder, *args, count=count, kind=kind)
    finish(company, seconds=seconds)
    codes = [process.exitcode for process in company]
    if any(codes):
        raise RuntimeError(f"the ranks ended with {codes}")
    return [torch.load(folder / f"{number}.pt", weights_only=False) for number in range(count)]


def start(work: Work, folder: Path, *args: object, count: int = 2, kind: str = "cpu") -> list[BaseProcess]:
    """The processes of the ranks, at work."""
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    company = [context.Process(target=_rank, args=(work, folder, kind, n, count, *args)) for n in range(count)]
    for process in company:
        process.start()
    return list(company)


def finish(company: list[BaseProcess], *, seconds: float = 60) -> float:
    """Wait for the end of all; returns the seconds it took. Raises TimeoutError, with all killed."""
    began = time.monotonic()
    for process in company:
        process.join(max(0.0, began + seconds - time.monotonic()))
    late = [process for process in company if process.exitcode is None]
    for process in late:
        process.kill()
    if late:
        raise TimeoutError(f"{len(late)} ranks were still at work after {seconds:g} s")
    return time.monotonic() - began


def _rank(work: Work, folder: Path, kind: str, number: int, count: int, *args: object) -> None:
    torch.set_num_threads(1)
    device = torch.device(kind, number) if kind == "cuda" else torch.device(kind)
    store = dist.FileStore(str(folder / "store"), count)  # pyright: ignore[reportPrivateImportUsage]
    ranks: Ranks = join(store, number, count, device=device, on_lost=lambda _error: os._exit(9), grace_seconds=2.0)
    try:
        found = work(ranks, *args)
        ranks.leave()
        torch.save(found, folder / f"{number}.pt")
    finally:
        ranks.close()
