"""What adapters cost whoever is served: over HTTP, by this machine's processor, with the embedded base.

Run: python -m benchmarks.serve_adapters            (some three minutes, nothing else running)

a. The time to the first token of a resident adapter against the base's, the same short prompts to both in turns.
b. From a new version's registration, while the server runs, to the first token of its first answer.
c. The largest gap between two tokens of a running stream while others ask rank-64 adapters that come from disk and go
   again, against the same questions to one that stays.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import httpx

from benchmarks.report import Row, at_most, write
from benchmarks.serving_adapters import BASE, PROBES, Made, make_adapters, record_probes
from benchmarks.serving_load import Wanted, ask, read_texts
from benchmarks.serving_tenon import read_metrics, tenon_server
from tenon.registry.entry import EntryDraft
from tenon.registry.probes import PROBES_NAME, Probes
from tenon.registry.store import Registry
from tenon.settings import Settings, read_settings

BASE_NAME = "base"
# 16 is what training takes where nothing is said.
RANKS, DEFAULT_RANK, WIDEST = (8, 16, 64), 16, 64
PAIRS, VERSIONS, STREAMS, COMING = 60, 7, 3, 6
STREAM_TOKENS, PAUSE_SECONDS = 300, 0.2
SHORT_WORDS, PROBE_WORDS = (8, 12), (20, 40)
FIRST_TOKEN_SECONDS, ADDED_MILLISECONDS = 1.0, 2.0


def main() -> None:
    """Measure all three and write the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry", action="store_true", help="nothing is written")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        settings = replace(read_settings(), home=Path(scratch) / "home")
        made = make_adapters(Path(scratch) / "resident", ranks=RANKS, settings=settings)
        coming = make_adapters(
            Path(scratch) / "coming", ranks=[WIDEST] * 2 * VERSIONS, seed=1, prefix="new", settings=settings
        )
        texts = read_texts(fewest_words=SHORT_WORDS[0], most_words=SHORT_WORDS[1])
        longer = read_texts(fewest_words=PROBE_WORDS[0], most_words=PROBE_WORDS[1])
        probes = record_probes(coming[:VERSIONS], longer, settings)
        cores = len(os.sched_getaffinity(0))
        with tenon_server(BASE, settings, cores=cores) as url:
            rows = asyncio.run(added_time(url, made, texts))
            rows += asyncio.run(new_versions(url, settings, coming, probes, texts))
        few = ("--slots", "2", "--adapter-memory", "1MB")
        with tenon_server(BASE, settings, cores=cores, options=few) as url:
            rows += asyncio.run(largest_gaps(url, made, coming[:COMING], texts))
    for row in rows:
        print(f"{row.what}: {row.value:.4g} {row.unit}" + (f" ({row.bound}: {row.met})" if row.bound else ""))
    if not a.dry:
        print(write("serve_adapters", rows))


def _client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=120, trust_env=False)


async def added_time(url: str, made: Sequence[Made], texts: Iterator[str]) -> list[Row]:
    """Medians of pairs: an adapter and the base are asked the same, now the one first and now the other."""
    rows = []
    async with _client(url) as client:
        for one in made:
            pairs = []
            for turn in range(PAIRS + 5):
                text, names = next(texts), (one.name, BASE_NAME)
                order = names if turn % 2 else names[::-1]
                first = {name: (await ask(client, Wanted(name, text, 2)))[0] for name in order}
                pairs.append((first[one.name], first[BASE_NAME]))
            pairs = pairs[5:]  # an adapter is loaded, and the machine is warm
            base = statistics.median(base for _, base in pairs) * 1e3
            added = statistics.median(own - base for own, base in pairs) * 1e3
            what = f"added by a resident adapter of rank {one.rank}, median of {PAIRS} pairs"
            bounded = one.rank == DEFAULT_RANK
            rows.append(Row(f"time to first token of the base beside rank {one.rank}, median", base, "ms"))
            rows.append(at_most(what, added, "ms", ADDED_MILLISECONDS) if bounded else Row(what, added, "ms"))
    return rows


async def new_versions(
    url: str, settings: Settings, coming: Sequence[Made], probes: Sequence[Probes], texts: Iterator[str]
) -> list[Row]:
    """From `Registry.register` of a folder that training has written to the first token: versions with their probes, as
    training registers them, and without, in turns.
    """
    registry = Registry(settings.registry)
    whole: dict[bool, list[float]] = {True: [], False: []}
    async with _client(url) as client:
        await ask(client, Wanted(BASE_NAME, next(texts), 2))
        # No two have equal files, which a server would know again.
        for pair in zip(coming, coming[VERSIONS:], probes, strict=False):
            for one, beside in ((pair[0], {PROBES_NAME: pair[2].to_json().encode()}), (pair[1], {})):
                draft = EntryDraft(base_spec=one.entry.base_spec, base_hash=one.entry.base_hash)
                began = time.perf_counter()
                entry = registry.register(one.name, one.folder, draft, beside=beside)
                registered = time.perf_counter()
                first, _, _ = await ask(client, Wanted(entry.label, next(texts), 2))
                whole[bool(beside)].append(registered - began + first)
    told = read_metrics(url)
    check = told["tenon_adapter_check_seconds_total"] / told["tenon_adapter_checks_total"] * 1e3
    what, short = f"a new version of rank {WIDEST}, with its probes", f"median of {VERSIONS}"
    return [
        at_most(
            f"registry to first token of {what}, {short}", statistics.median(whole[True]), "s", FIRST_TOKEN_SECONDS
        ),
        Row(f"registry to first token of {what}, longest", max(whole[True]), "s"),
        Row(f"registry to first token without probes, {short}", statistics.median(whole[False]), "s"),
        Row(f"asking {PROBES} probes, mean", check, "ms"),
        Row("adapters whose probes were asked", told["tenon_adapter_checks_total"], "adapters"),
    ]


async def largest_gaps(url: str, made: Sequence[Made], coming: Sequence[Made], texts: Iterator[str]) -> list[Row]:
    """Streams of one adapter, with others coming and going beside it and without, in turns."""
    stays, steady = made[-1].name, made[0].name
    names = {"that stays": [stays], "that come and go": [one.name for one in coming]}
    gaps: dict[str, list[list[float]]] = {kind: [] for kind in names}
    changes = dict.fromkeys(names, 0)
    async with _client(url) as client:
        for name in (steady, stays):
            await ask(client, Wanted(name, next(texts), 2))
        for _ in range(STREAMS):
            for kind, some in names.items():
                before = _loads(url)
                beside = asyncio.create_task(_keep_asking(client, itertools.cycle(some), texts))
                gaps[kind].append(await _stream(client, Wanted(steady, next(texts), STREAM_TOKENS)))
                beside.cancel()
                with suppress(asyncio.CancelledError):
                    await beside
                changes[kind] += _loads(url) - before
    rows = []
    for kind, streams in gaps.items():
        flat = [gap for stream in streams for gap in stream]
        where = f"while others ask rank-{WIDEST} adapters {kind}"
        rows.append(Row(f"adapters put into a slot {where}", changes[kind], "loads"))
        rows.append(Row(f"median gap between tokens {where}", statistics.median(flat) * 1e3, "ms"))
        rows.append(Row(f"99th percentile of gaps {where}", statistics.quantiles(flat, n=100)[98] * 1e3, "ms"))
        rows.append(Row(f"largest gap {where}, median of {STREAMS}", statistics.median(map(max, streams)) * 1e3, "ms"))
    return rows


def _loads(url: str) -> int:
    return int(read_metrics(url)["tenon_adapter_loads_total"])


async def _keep_asking(client: httpx.AsyncClient, names: Iterator[str], texts: Iterator[str]) -> None:
    """Short questions, one after the other, until cancelled."""
    while True:
        await ask(client, Wanted(next(names), next(texts), 2))
        await asyncio.sleep(PAUSE_SECONDS)


async def _stream(client: httpx.AsyncClient, wanted: Wanted) -> list[float]:
    """Seconds between the tokens of one answer, as they arrive."""
    times = []
    async with client.stream("POST", "/completions", json=wanted.body()) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                times.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(times)]


if __name__ == "__main__":
    main()
