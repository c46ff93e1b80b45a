"""A hundred adapters in eight slots: what that costs against slots for all, under a load as it comes from many people.

Run: python -m benchmarks.serve_zipf            (some five minutes, nothing else running)

Requests come at random moments, whatever the server does; which adapter each one asks follows Zipf's law. Two servers,
which differ in `--slots` alone, take the same requests in turns, never at the same time.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from benchmarks.report import Row, at_most, write
from benchmarks.serving_adapters import BASE, RANKS, Made, make_adapters
from benchmarks.serving_load import Wanted, ask, read_texts
from benchmarks.serving_tenon import read_metrics, tenon_server
from tenon.settings import read_settings

ADAPTERS, SLOTS, EXPONENT, TIMES_BOUND = 100, 8, 1.0, 4.0
ANSWER_TOKENS, WORDS = (4, 12), (8, 40)
ADAPTER_WAIT_SECONDS = 2.0
# So that some of what leaves a slot is read from disk again.
MEMORY = "1GB"


@dataclass(frozen=True, slots=True)
class Answer:
    """Seconds from the request to its first token, and to its end."""

    first: float
    whole: float


def main() -> None:
    """Measure both and write the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=45.0, help="of load, for each server in each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="nothing is written")
    a = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch:
        settings = replace(read_settings(), home=Path(scratch) / "home")
        ranks = list(itertools.islice(itertools.cycle(RANKS), ADAPTERS))
        made = make_adapters(Path(scratch) / "made", ranks=ranks, settings=settings)
        options = ("--adapter-memory", MEMORY, "--adapter-wait", str(ADAPTER_WAIT_SECONDS), "--slots")
        with (
            tenon_server(BASE, settings, cores=cores, options=(*options, str(SLOTS))) as few,
            tenon_server(BASE, settings, cores=cores, options=(*options, str(ADAPTERS))) as all_of_them,
        ):
            warm((few, all_of_them), made)
            before = read_metrics(few)
            found = measure((few, all_of_them), made, rate=a.rate, seconds=a.seconds, rounds=a.rounds)
            rows = summary(found[few], found[all_of_them], before, read_metrics(few), rate=a.rate)
    for row in rows:
        print(f"{row.what}: {row.value:.4g} {row.unit}" + (f" ({row.bound}: {row.met})" if row.bound else ""))
    if not a.dry:
        print(write("serve_zipf", rows))


def warm(urls: Sequence[str], made: Sequence[Made]) -> None:
    """Have every adapter asked once."""
    for url in urls:
        asyncio.run(_ask_each(url, [Wanted(one.entry.label, "warm", 1) for one in made]))
        print(f"{url} is warm: {read_metrics(url)['tenon_adapters_resident']:.0f} adapters in slots", flush=True)


def measure(
    urls: Sequence[str], made: Sequence[Made], *, rate: float, seconds: float, rounds: int
) -> dict[str, list[Answer]]:
    """The answers of each server, those of all rounds together."""
    texts = read_texts(fewest_words=WORDS[0], most_words=WORDS[1])
    found: dict[str, list[Answer]] = {url: [] for url in urls}
    for turn in range(rounds):
        wanted = list(arrivals(made, texts, rate=rate, seconds=seconds, seed=turn))
        for url in urls[:: -1 if turn % 2 else 1]:
            answers = asyncio.run(_open_loop(url, wanted))
            found[url] += answers
            first = statistics.median(answer.first for answer in answers)
            print(f"round {turn + 1}, {url}: {len(answers)} answers, first token {first:.3f} s (median)", flush=True)
    return found


def arrivals(
    made: Sequence[Made], texts: Iterator[str], *, rate: float, seconds: float, seed: int
) -> Iterator[tuple[float, Wanted]]:
    """When which request comes, in seconds from the beginning: a Poisson process."""
    dice, at = random.Random(seed), 0.0
    popular = list(made)
    random.Random(0).shuffle(popular)  # the popular ones are of any rank
    weights = [1 / (place + 1) ** EXPONENT for place in range(len(popular))]
    while (at := at + dice.expovariate(rate)) < seconds:
        (one,) = dice.choices(popular, weights)
        yield at, Wanted(one.entry.label, next(texts), dice.randint(*ANSWER_TOKENS))


def _client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx.AsyncClient(base_url=url, timeout=300, limits=limits, trust_env=False)


async def _ask_each(url: str, wanted: Sequence[Wanted]) -> None:
    async with _client(url) as client:
        for one in wanted:
            await ask(client, one)


async def _open_loop(url: str, wanted: Sequence[tuple[float, Wanted]]) -> list[Answer]:
    """Ask at the moments given, whether or not what was asked before is answered."""
    async with _client(url) as client:
        began = time.perf_counter()

        async def at_its_time(at: float, one: Wanted) -> Answer:
            await asyncio.sleep(began + at - time.perf_counter())
            asked = time.perf_counter()
            first, _, _ = await ask(client, one)
            return Answer(first, time.perf_counter() - asked)

        return await asyncio.gather(*(at_its_time(at, one) for at, one in wanted))


def summary(
    few: Sequence[Answer],
    resident: Sequence[Answer],
    before: dict[str, float],
    told: dict[str, float],
    *,
    rate: float,
) -> list[Row]:
    """Both sides, and the longest wait for a slot. before, told: the metrics of the server with few slots, before the
    load and after it.

    The bound is that of `serve.turns` as it is where nobody else waits (p = 1), which is when it is smallest: T is the
    longest answer of the server whose adapters are all resident, L what reading an adapter takes in the mean.
    """
    rows = [
        Row("requests to each server", len(few), "requests"),
        Row("rate", rate, "requests/s"),
    ]
    for tier, where in (("slot", "in a slot"), ("memory", "in memory"), ("disk", "on disk")):
        series = f'tenon_adapter_sequences_total{{tier="{tier}"}}'
        rows.append(Row(f"sequences whose adapter was {where}", told[series] - before[series], "sequences"))
    for name, answers in ((f"{SLOTS} slots", few), (f"{ADAPTERS} slots", resident)):
        for percent in (50, 95):
            rows.append(Row(f"time to first token, p{percent}, {name}", _first(answers, percent), "s"))
    times = _first(few, 95) / _first(resident, 95)
    rows.append(at_most(f"p95 of {SLOTS} slots against {ADAPTERS}", times, "times", TIMES_BOUND))
    longest = max(answer.whole for answer in resident)
    read = told["tenon_adapter_read_seconds_total"] / told["tenon_adapter_reads_total"]
    bound = ADAPTER_WAIT_SECONDS + longest + 2 * read
    rows.append(at_most("longest wait for a slot", told["tenon_adapter_wait_seconds_most"], "s", bound))
    rows.append(Row("--adapter-wait", ADAPTER_WAIT_SECONDS, "s"))
    return rows


def _first(answers: Sequence[Answer], percent: int) -> float:
    return statistics.quantiles((answer.first for answer in answers), n=100, method="inclusive")[percent - 1]


if __name__ == "__main__":
    main()
