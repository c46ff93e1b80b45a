"""What several engines bring, and what the front before them costs: SmolLM2-135M on the cores of this machine.

Run: python -m benchmarks.serve_replicas        (some six minutes, nothing else running)

Throughput: one engine with one thread against two with one thread each, eight clients. Cost of the front: one engine in
a process of its own against the same one in the server's, one client, so that each token's way is seen by itself.
Both sides are up all the time and are asked in turns, never at the same time; medians of the rounds are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

from benchmarks.report import Row, at_least, write
from benchmarks.serving_load import Load, Wanted, drive, read_texts
from tenon.plan.requests import Engine, Replicas, Seat, ServeRequest
from tenon.service.serving import Serving, open_base, public_name
from tenon.settings import Settings, read_settings

CLIENTS, ANSWER_TOKENS, ANSWERS = 8, 48, 16
ALONE_TOKENS, ALONE_ANSWERS = 96, 3
# Two engines on two cores share their memory's bandwidth: less than twice is what there is to get.
LEAST_GAIN = 1.5


def main() -> None:
    """Measure both and write benchmarks/results/serve_replicas.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds: int = parser.parse_args().rounds
    settings = read_settings()
    with tempfile.TemporaryDirectory() as home:
        own = replace(settings, home=Path(home), threads=1)
        rows = [*throughput(own, rounds), *front(own, rounds)]
    path = write("serve_replicas", rows)
    for row in rows:
        print(f"{row.what}: {row.value:.4g} {row.unit}{f' ({row.bound})' if row.bound else ''}")
    print(path)


def throughput(settings: Settings, rounds: int) -> list[Row]:
    """Tokens a second of one engine and of two."""
    with ExitStack() as stack:
        urls = [stack.enter_context(server(settings, engines)) for engines in (1, 2)]
        loads = in_turns(urls, rounds, answers=ANSWERS, tokens=ANSWER_TOKENS, clients=CLIENTS)
    one, two = (statistics.median(load.tokens_per_second for load in some) for some in loads)
    what = f"{CLIENTS} clients, a thread an engine"
    return [
        Row(f"{what}: one engine", one, "tokens/s"),
        Row(f"{what}: two engines", two, "tokens/s"),
        at_least(f"{what}: two over one", two / one, "times", LEAST_GAIN),
    ]


def front(settings: Settings, rounds: int) -> list[Row]:
    """What a token's way through a second process adds: to the first one, and to each that follows."""
    with ExitStack() as stack:
        urls = [stack.enter_context(server(settings, engines)) for engines in (0, 1)]
        loads = in_turns(urls, 2 * rounds, answers=ALONE_ANSWERS, tokens=ALONE_TOKENS, clients=1)
    first = [statistics.median(load.first(50) for load in some) * 1000 for some in loads]
    each = [statistics.median(token_seconds(load) for load in some) * 1000 for some in loads]
    rows = []
    for name, (here, there) in (("to first token", first), ("per token", each)):
        rows += [
            Row(f"one client, {name}: engine in the server's process", here, "ms"),
            Row(f"one client, {name}: engine behind a front", there, "ms"),
            Row(f"one client, {name}: added by the front", there - here, "ms"),
        ]
    return rows


def token_seconds(load: Load) -> float:
    """Of one client, between two tokens of an answer."""
    answers = len(load.first_seconds)
    return (load.seconds - sum(load.first_seconds)) / (load.answer_tokens - answers)


def in_turns(urls: Sequence[str], rounds: int, *, answers: int, tokens: int, clients: int) -> list[list[Load]]:
    """Each server's loads of all rounds, after one that is not counted. The same texts for all, none of them twice."""
    texts = read_texts(fewest_words=40, most_words=80)
    loads: list[list[Load]] = [[] for _ in urls]
    for turn in range(rounds + 1):
        wanted = [Wanted("base", text, tokens) for text in islice(texts, answers)]
        for url, some in zip(urls, loads, strict=True):
            load = asyncio.run(drive(f"{url}/v1", wanted, clients=clients))
            some.extend([load] if turn else [])
    return loads


@contextmanager
def server(settings: Settings, engines: int) -> Iterator[str]:
    """Where a server with so many engines listens; 0 has one in its own process. Each engine has one thread."""
    engine = one_thread(open_base(None, settings))
    seats = tuple(Seat(machine=engine.machine) for _ in range(engines))
    request = ServeRequest(
        engine=engine,
        name=public_name(engine.base),
        port=0,
        rows=CLIENTS,
        context_tokens=512,
        cache_bytes=1 << 29,
        drain_seconds=5.0,
        replicas=Replicas(seats=seats, least=engines) if engines else None,
    )
    serving = Serving(request, settings)
    try:
        yield next(event["url"] for event in serving.events() if event["kind"] == "ready")
    finally:
        serving.worker.stop()
        serving.finish()


def one_thread(engine: Engine) -> Engine:
    """The engine as planned for one thread."""
    return engine.model_copy(update={"machine": engine.machine.model_copy(update={"threads": 1})})


if __name__ == "__main__":
    main()
