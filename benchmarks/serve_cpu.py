"""Serving on this machine's processor: tokens a second of Tenon against vLLM, eight adapters and sixteen clients.

Run: python -m benchmarks.serve_cpu            (after `make vllm`; some eight minutes, nothing else running)

Both servers have the same base, adapters, prompts and number of cores. They take the same load in turns, never at the
same time, and medians of the rounds are compared. vLLM is measured in fp32, as Tenon computes, and in bf16, its own
choice; whichever is faster is what Tenon is held against.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.report import Row, at_least, write
from benchmarks.serving_adapters import BASE, RANKS, make_adapters
from benchmarks.serving_load import Load, Wanted, drive, read_texts
from benchmarks.serving_tenon import tenon_server
from benchmarks.serving_vllm import vllm_server, vllm_versions
from tenon.bases.locate import locate_base
from tenon.models.prepare import prepare_base
from tenon.settings import read_settings

CLIENTS, BOUND = 16, 1.5
# vLLM says some seven tokens a second here: longer answers would take an hour.
ANSWER_TOKENS = (32, 64)
WARM_TOKENS = 4
# About 64 to 200 tokens.
WORDS = (40, 120)
TENON, BASE_NAME = "Tenon", "base"
# More than all sequences take at once, twice over.
CACHE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class System:
    """A server that runs."""

    name: str
    url: str
    key: str = ""


@dataclass(frozen=True, slots=True)
class Scene:
    """A kind of load. adapters: whether it is spread over all of them, or asks the base. answers: in one round."""

    name: str
    clients: int
    adapters: bool
    answers: int


MIXED = Scene("8 adapters, 16 clients", CLIENTS, adapters=True, answers=CLIENTS)
PLAIN = Scene("base only, 16 clients", CLIENTS, adapters=False, answers=CLIENTS)
ALONE = Scene("one adapter, 1 client", 1, adapters=True, answers=1)


def main() -> None:
    """Measure all scenes in turn and write the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-vllm", action="store_true", help="Tenon alone; nothing is written")
    a = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        settings = replace(read_settings(), home=Path(scratch) / "home")
        base = prepare_base(locate_base(BASE, settings), settings)
        made = make_adapters(Path(scratch) / "adapters", settings=settings)
        folders = {one.name: one.folder for one in made}
        options = ("--slots", str(len(RANKS)), "--rows", str(CLIENTS), "--cache", str(CACHE_BYTES))
        systems = [System(TENON, stack.enter_context(tenon_server(BASE, settings, cores=cores, options=options)))]
        for dtype in () if a.without_vllm else ("float32", "bfloat16"):
            environment = {"VLLM_CPU_OMP_THREADS_BIND": "-".join(str(core) for core in (0, cores - 1))}
            vllm = stack.enter_context(
                vllm_server(
                    base,
                    folders,
                    threads=cores,
                    dtype=dtype,
                    rows=CLIENTS,
                    cache_bytes=CACHE_BYTES,
                    environment=environment,
                )
            )
            systems.append(System(f"vLLM {dtype}", vllm.url, vllm.key))
            print(f"{systems[-1].name} is ready", flush=True)
        found = measure(systems, tuple(folders), a.rounds)
    rows = summary(found)
    for row in rows:
        print(f"{row.what}: {row.value:.3g} {row.unit}{f' ({row.bound})' if row.bound else ''}")
    if not a.without_vllm:
        print(write("serve_cpu", rows, versions=vllm_versions()))


def measure(systems: Sequence[System], adapters: tuple[str, ...], rounds: int) -> dict[Scene, dict[str, list[Load]]]:
    """What each system did in each scene, round by round. The slower vLLM is left out after its first round."""
    texts = read_texts(fewest_words=WORDS[0], most_words=WORDS[1])
    found: dict[Scene, dict[str, list[Load]]] = {scene: {} for scene in (MIXED, PLAIN, ALONE)}
    for system in systems:
        # Kernels are made, adapters are loaded, memory is taken.
        warm = [replace(wanted, answer_tokens=WARM_TOKENS) for wanted in requests(MIXED, adapters, texts)]
        _run(system, MIXED, warm)
    left = list(systems)
    for turn in range(rounds):
        for scene, loads in found.items():
            wanted = requests(scene, adapters, texts)
            # Each is the first as often as any other.
            for system in left[turn % len(left) :] + left[: turn % len(left)]:
                loads.setdefault(system.name, []).append(_run(system, scene, wanted))
        left = [system for system in left if system.name in (TENON, fastest(found[MIXED]))]
    return found


def requests(scene: Scene, adapters: tuple[str, ...], texts: Iterator[str]) -> list[Wanted]:
    """The completions of one round, no text twice; lengths of answers are evenly spread."""
    fewest, most = ANSWER_TOKENS
    models = itertools.cycle(adapters if scene.adapters else (BASE_NAME,))
    return [
        Wanted(next(models), next(texts), fewest + (turn * 29) % (most - fewest + 1)) for turn in range(scene.answers)
    ]


def _run(system: System, scene: Scene, wanted: Sequence[Wanted]) -> Load:
    load = asyncio.run(drive(system.url, wanted, clients=scene.clients, key=system.key))
    print(f"{scene.name}, {system.name}: {load.tokens_per_second:.1f} tokens/s", flush=True)
    return load


def fastest(loads: Mapping[str, Sequence[Load]]) -> str:
    """The vLLM with the most tokens a second; Tenon where there is none."""
    peers = {name: _speed(some) for name, some in loads.items() if name != TENON}
    return max(peers, key=peers.__getitem__, default=TENON)


def _speed(loads: Sequence[Load]) -> float:
    return statistics.median(load.tokens_per_second for load in loads)


def summary(found: Mapping[Scene, Mapping[str, Sequence[Load]]]) -> list[Row]:
    """Medians of the rounds, and Tenon against the faster vLLM."""
    rows = []
    for scene, loads in found.items():
        for name, some in loads.items():
            rows.append(Row(f"{scene.name}, {name}", _speed(some), "tokens/s"))
            for percent in (50, 95) if scene.clients > 1 else (50,):
                first = statistics.median(load.first(percent) for load in some)
                rows.append(Row(f"{scene.name}, {name}, first token, p{percent}", first, "s"))
        peer = fastest(loads)
        if peer != TENON:
            ratio, what = _speed(loads[TENON]) / _speed(loads[peer]), f"{scene.name}, Tenon against the faster vLLM"
            rows.append(at_least(what, ratio, "times", BOUND) if scene is MIXED else Row(what, ratio, "times"))
    return rows


if __name__ == "__main__":
    main()
