"""Half an hour of everything at once against a real `tenon serve`: is memory flat, and do its counters add up?

Clients ask, stream, read slowly, go away, score prompts and send what must be refused, while adapters are registered
and removed and an alias flips. Then nothing may be open, every counter must be the sum of what the clients saw, and
every seeded request must have had the same answer each time.

Memory: the resident memory of the server's worker, sampled all the time; the first third is warming up (pages of the
cache are touched for the first time, the texts of tokens are kept). Of the last two thirds a line is fitted. An
allocator gives pages back when it likes, so a few megabytes come and go.

Run: python -m benchmarks.serve_soak --minutes 30        writes benchmarks/results/serve_soak.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.report import Row, at_most, write
from benchmarks.serving_adapters import Made, make_adapters
from benchmarks.soak_load import CHAT, SCHEMA, TEXT, Client, Guests, Keys, Tally, seeded
from benchmarks.soak_wire import Address, Exchange
from tenon.registry.entry import EntryDraft
from tenon.registry.store import Registry
from tenon.service.bases import describe_base
from tenon.settings import Settings, child_environment, read_settings
from tenon.tenants.keys import KeyStore, Limits
from tenon.tenants.usage import UsageBook

CLIENTS, SLOTS, CONTEXT = 8, 3, 1024
# Of the worker's memory, over the last two thirds: what allocators and memory that is touched late may add.
GROWTH_BOUND = 0.03
_GUESTS_AT_MOST = 6
_SEEDS = 24


@dataclass(frozen=True, slots=True)
class Place:
    """A running server, and what it stands on."""

    address: Address
    worker: psutil.Process
    settings: Settings
    base: str
    fixed: list[str]
    spare: list[Made]
    context_tokens: int


@contextmanager
def started(root: Path, base: str, settings: Settings, *, context_tokens: int = CONTEXT) -> Iterator[Place]:
    """A server over its own registry, with some adapters that stay and some to register."""
    fixed = make_adapters(root / "fixed", base, ranks=(4, 16), prefix="fixed", settings=settings)
    spare = make_adapters(root / "spare", base, ranks=(2, 4, 8, 12, 24), seed=1, prefix="spare", settings=settings)
    # So small a cache that all of it has been touched when the first third is over, and rows wait for it now and then.
    words = ["--port", "0", "--json", "--rows", "8", "--slots", str(SLOTS), "--context", str(context_tokens)]
    words += ["--cache", "300MB"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tenon.cli.main", "serve", base, *words],
        env=child_environment(settings),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        ready = json.loads(process.stdout.readline())
        host, _, port = ready["url"].removeprefix("http://").partition(":")
        children = psutil.Process(process.pid).children(recursive=True)
        worker = max(children, key=lambda child: child.memory_info().rss)
        names = ["base", *(made.name for made in fixed)]
        yield Place(Address(host, int(port)), worker, settings, base, names, spare, context_tokens)
    finally:
        process.terminate()
        process.wait(60)


async def soak(place: Place, seconds: float) -> list[Row]:
    """Run the load for so long and hold the server against it."""
    store, book = KeyStore(place.settings.keys), UsageBook(place.settings.usage)
    kept = [store.create("steady"), store.create("cut"), store.create("narrow", rights=("fixed-*",))]
    kept.append(store.create("poor", limits=Limits(tokens_per_month=1)))
    keys = Keys(*(typed for typed, _ in kept))
    registry = Registry(place.settings.registry)
    spec = describe_base(place.base, place.settings)
    draft = EntryDraft(base_spec=spec.spec, base_hash=spec.base_hash)
    for made in place.spare[:2]:
        registry.register("moving", made.folder, draft)
    registry.set_alias("moving@live", {1: 1.0})
    tally, guests, stop = Tally(), Guests(), asyncio.Event()
    has_schema = await _has_schema(place, keys, tally)
    known = await _known(place, keys, tally)
    clients = [
        Client(
            place.address,
            keys,
            tally,
            guests,
            fixed=place.fixed,
            alias="moving@live",
            context_tokens=place.context_tokens,
            has_schema=has_schema,
            seed=number,
        )
        for number in range(CLIENTS)
    ]
    for client in clients:
        client.known = known
    memory: list[tuple[float, int]] = []
    async with asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(client.run(stop))
        changes = group.create_task(_change(registry, place.spare, draft, guests, stop))
        group.create_task(_watch(place.worker, memory, stop, seconds))
        await asyncio.sleep(seconds)
        stop.set()
    flips, registered = changes.result()
    after = await _known(place, keys, tally)
    unlike = sum(known[seed] != after[seed] for seed in range(_SEEDS))
    free = await _slots_are_free(place, registry, draft, keys, tally)
    accounts = {key.tenant: key.account for _, key in kept}
    server = await _settled(place, book, list(accounts.values()))
    for event in tally.unexpected[:20]:
        print(f"unexpected: {event[:500]}", flush=True)
    return [
        Row("length", seconds, "s"),
        Row("requests sent", sum(tally.statuses.values()) + sum(tally.cut.values()), "requests"),
        Row("of them cut off by their client", sum(tally.cut.values()), "requests"),
        Row("of them refused", sum(n for (_, status), n in tally.statuses.items() if status >= 400), "requests"),
        Row("adapters registered and removed", registered, "adapters"),
        Row("flips of the alias", flips, "flips"),
        Row("answers of a JSON schema", tally.kinds["schema"], "requests"),
        Row("seeded requests repeated under load", tally.repeated, "requests"),
        at_most("answers to seeded requests that changed, after the load", unlike, "answers", 0),
        at_most("what should never be", len(tally.unexpected), "events", 0),
        *_counters(tally, server, book, accounts),
        at_most("slots that are still held", SLOTS - free, "slots", 0),
        *_memory(memory),
    ]


# ---- while it runs --------------------------------------------------------------------------------------------------


async def _change(
    registry: Registry, spare: list[Made], draft: EntryDraft, guests: Guests, stop: asyncio.Event
) -> tuple[int, int]:
    """Register and remove guests and flip the alias until the end; how often the alias flipped, how many came."""
    draw, flips, came = random.Random(0), 0, 0
    while not stop.is_set():
        await asyncio.sleep(draw.uniform(0.3, 1.5))
        act = draw.randrange(3)
        if act == 0:
            flips += 1
            await asyncio.to_thread(registry.set_alias, "moving@live", {1 + flips % 2: 1.0})
        elif act == 1 and len(guests.names) < _GUESTS_AT_MOST:
            name = f"guest-{came % 20}"
            if name not in guests.names:
                await asyncio.to_thread(registry.register, name, draw.choice(spare).folder, draft)
                guests.names.append(name)
                came += 1
        elif guests.names:
            await asyncio.to_thread(registry.remove, guests.names.pop(0))
    return flips, came


async def _watch(worker: psutil.Process, memory: list[tuple[float, int]], stop: asyncio.Event, seconds: float) -> None:
    began = time.monotonic()
    while not stop.is_set():
        memory.append((time.monotonic() - began, worker.memory_info().rss))
        await asyncio.sleep(seconds / 400)


async def _known(place: Place, keys: Keys, tally: Tally) -> dict[int, str]:
    """What every seeded request says while nothing else runs."""
    found = {}
    for seed in range(_SEEDS):
        body = seeded(place.fixed, seed)
        answer = await _asked(place, TEXT, body, keys, tally)
        found[seed] = answer["choices"][0]["text"]
    return found


async def _has_schema(place: Place, keys: Keys, tally: Tally) -> bool:
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
    messages = [{"role": "user", "content": "the lake"}]
    body = {"model": "base", "max_tokens": 1, "messages": messages, "response_format": form}
    return "choices" in await _asked(place, CHAT, body, keys, tally)


async def _asked(place: Place, route: str, body: dict[str, Any], keys: Keys, tally: Tally) -> dict[str, Any]:
    """One request with the steady key, counted with all others."""
    async with Exchange(place.address, route, body, keys.steady) as exchange:
        status = await exchange.status()
        found = await exchange.whole()
    tally.statuses[route, status] += 1
    if status == 200:
        tally.tokens += found["usage"]["total_tokens"]
    return found


# ---- after it -------------------------------------------------------------------------------------------------------


async def _slots_are_free(place: Place, registry: Registry, draft: EntryDraft, keys: Keys, tally: Tally) -> int:
    """How many adapters that nobody asked before find a slot, one after the other, and stay."""
    labels = []
    for number in range(SLOTS):
        entry = registry.register(f"last-{number}", place.spare[number].folder, draft)
        await _asked(place, TEXT, {"model": entry.label, "prompt": "the", "max_tokens": 1}, keys, tally)
        labels.append(entry.label)
    # Equal files are one adapter to the engine; these are of three different folders.
    async with Exchange(place.address, "/v1/models", None, keys.steady) as exchange:
        tally.statuses["/v1/models", await exchange.status()] += 1
        listed = (await exchange.whole())["data"]
    return sum(model["id"] in labels and model["state"] == "resident" for model in listed)


@dataclass(frozen=True, slots=True)
class Counters:
    """What the server says of itself: answers by route and status, tokens that it counted, what is still open."""

    answers: dict[tuple[str, int], int]
    tokens: int
    open: float


async def _settled(place: Place, book: UsageBook, accounts: list[str]) -> Counters:
    """The server's counters once nothing is open any more, or after a minute."""
    found = Counters({}, 0, 1)
    for _ in range(120):
        async with Exchange(place.address, "/metrics", None, "") as exchange:
            await exchange.status()
            found = _read_metrics(await exchange.whole())
        if not found.open and not sum(book.used(account).reserved_tokens for account in accounts):
            break
        await asyncio.sleep(0.5)
    return found


def _read_metrics(text: str) -> Counters:
    answers: dict[tuple[str, int], int] = {}
    tokens, still_open = 0.0, 0.0
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        if name.startswith("tenon_requests_total{"):
            labels = dict(part.split("=") for part in name.partition("{")[2].rstrip("}").replace('"', "").split(","))
            answers[labels["route"], int(labels["status"])] = int(float(value))
        elif name.startswith(("tenon_tenant_prompt_tokens_total", "tenon_tenant_completion_tokens_total")):
            tokens += float(value)
        elif name.partition("{")[0] in _OPEN:
            still_open += float(value)
    return Counters(answers, int(tokens), still_open)


_OPEN = (
    "tenon_sequences_running",
    "tenon_sequences_waiting",
    "tenon_sequences_parked",
    "tenon_cache_used_ratio",
)


def _counters(tally: Tally, server: Counters, book: UsageBook, accounts: dict[str, str]) -> list[Row]:
    """Every counter against what the clients saw."""
    used = {tenant: book.used(account) for tenant, account in accounts.items()}
    routes = {route for route, _ in tally.statuses}
    wrong = 0
    for route in routes:
        mine = {status: n for (r, status), n in tally.statuses.items() if r == route}
        theirs = {status: n for (r, status), n in server.answers.items() if r == route}
        # What was cut off is an answer that began, or one that nobody waited for (499).
        began = theirs.pop(200, 0) + theirs.pop(499, 0)
        wrong += abs(began - mine.pop(200, 0) - tally.cut[route])
        wrong += sum(abs(mine.get(s, 0) - theirs.get(s, 0)) for s in mine.keys() | theirs.keys())
    cut = used["cut"].tokens
    return [
        at_most("answers that server and clients count differently", wrong, "requests", 0),
        at_most("tokens: usage book against usage fields", abs(used["steady"].tokens - tally.tokens), "tokens", 0),
        at_most(
            "tokens: usage book against the server's counters",
            abs(sum(one.tokens for one in used.values()) - server.tokens),
            "tokens",
            0,
        ),
        at_most(
            "tokens of what was cut off: outside of what it may have come to",
            max(tally.cut_least - cut, cut - tally.cut_most, 0),
            "tokens",
            0,
        ),
        at_most("tokens of keys that were refused", used["narrow"].tokens + used["poor"].tokens, "tokens", 0),
        at_most("tokens still reserved", sum(one.reserved_tokens for one in used.values()), "tokens", 0),
        at_most("sequences and cache blocks still held", server.open, "", 0),
    ]


def _memory(memory: list[tuple[float, int]]) -> list[Row]:
    """The worker's memory, and how it grew over the last two thirds."""
    times, sizes = np.array(memory).T
    late = times >= times[-1] / 3
    slope = float(np.polyfit(times[late], sizes[late], 1)[0])
    growth = slope * float(times[late][-1] - times[late][0]) / float(sizes[late].mean())
    return [
        Row("memory of the worker, mean of the last two thirds", float(sizes[late].mean()) / 2**20, "MiB"),
        Row("its slope there", slope * 60 / 2**20, "MiB/min"),
        at_most("its growth there, as a share", growth, "", GROWTH_BOUND),
    ]


def main() -> None:
    """Soak, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--base", default="smollm2-135m")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        home = Path(root) / "home"
        settings = Settings(home=home, cache=read_settings().cache, offline=True, threads=0, debug=False)
        with started(Path(root), asked.base, settings) as place:
            rows = asyncio.run(soak(place, asked.minutes * 60))
    for row in rows:
        print(f"{row.what}: {row.value:.6g} {row.unit}{f' ({row.bound})' if row.bound else ''}")
    print(write("serve_soak", rows))
    sys.exit(any(row.met is False for row in rows))


if __name__ == "__main__":
    main()
