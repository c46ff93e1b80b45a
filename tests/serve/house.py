"""A server over a tiny random base with registered adapters of different rank, in this process."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tenon.adapters.bank import AdapterBank
from tenon.adapters.peft_files import load_adapter, read_adapter, write_adapter
from tenon.batch import NO_SLOT
from tenon.data.grammars import Grammars
from tenon.data.render import Renderer
from tenon.infer.generate import generate
from tenon.infer.requests import Completion, Request
from tenon.models.decoder import Decoder
from tenon.pipeline.base import find_base
from tenon.pipeline.engine import load_workbench
from tenon.plan.values import BasePlan
from tenon.registry.entry import Entry, EntryDraft
from tenon.registry.store import Registry
from tenon.serve.engine.adapter_files import AdapterReader
from tenon.serve.engine.loop import EngineLoop
from tenon.serve.front.access import Access
from tenon.serve.front.names import Names
from tenon.serve.jobs import Deliver, Limits
from tenon.serve.run import Managing, Options, Server, address, listen
from tenon.service.bases import describe_base
from tests.journeys.world import World, make_world
from tests.plan.situations import CPU as MACHINE
from tests.tiny import CPU, random_slot, slot_shape

CONTEXT = 256
# One sequence that would run until the context is full.
LONG = {"prompt": "the lake", "max_tokens": CONTEXT - 20, "ignore_eos": True}


@dataclass(frozen=True, slots=True)
class House:
    """A base, loaded once, and its registry: `low` has rank 2, `high` rank 7."""

    world: World
    base: BasePlan
    decoder: Decoder
    renderer: Renderer
    registry: Registry

    def register(
        self, name: str, *, rank: int, seed: int, beside: dict[str, bytes] | None = None, **draft: Any
    ) -> Entry:
        """A random adapter, as a new version. beside: files to keep with it."""
        bank = AdapterBank(self.base.facts, dtype=torch.float32, device=CPU)
        slot = random_slot(bank, slot_shape(self.base.facts, rank=rank), seed, trained=False)
        folder = self.world.root / f"made-{name}-{seed}"
        folder.mkdir()
        write_adapter(folder, bank.slots[slot], base="base")
        fields = {"base_spec": self.base.spec, "base_hash": self.base.base_hash, **draft}
        return self.registry.register(name, folder, EntryDraft(**fields), beside=beside)

    def expected(self, prompts: list[list[int]], names: list[str | None], **changes: Any) -> list[Completion]:
        """What `generate` answers, each prompt by its adapter (None: the base)."""
        bank = AdapterBank(self.base.facts, dtype=torch.float32, device=CPU)
        slots: dict[str | None, int] = {None: NO_SLOT}
        for name in {name for name in names if name is not None}:
            slots[name] = load_adapter(bank, name, read_adapter(self.registry.folder(self.registry.get(name))))
        stops = {"stop_ids": self.renderer.stop_ids, **changes}
        requests = [Request(p, slot=slots[name], **stops) for p, name in zip(prompts, names, strict=True)]
        return generate(self.decoder, bank, requests)

    def decode(self, ids: tuple[int, ...]) -> str:
        """Ids as text."""
        return self.renderer.tokenizer.decode(ids)


@dataclass(frozen=True, slots=True)
class Running:
    """A server that runs."""

    server: Server
    host: str
    port: int

    @property
    def url(self) -> str:
        """Where OpenAI's client finds it."""
        return f"http://{self.host}:{self.port}/v1"

    def connect(self) -> http.client.HTTPConnection:
        """A connection of one's own."""
        return http.client.HTTPConnection(self.host, self.port, timeout=30)

    def ask(self, path: str, body: Any = None, *, key: str = "") -> tuple[int, Any]:
        """Status and JSON of one answer. body: sent as JSON, or as it is when it is bytes; None is a GET."""
        connection = self.connect()
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        try:
            if body is None:
                connection.request("GET", path, headers=headers)
            else:
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                connection.request("POST", path, data, headers)
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text[:1] in b"{[" else text.decode()
        finally:
            connection.close()

    def start_stream(self, **fields: Any) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """A completion as a stream; its first chunk has come. Close the connection."""
        connection = self.connect()
        body = json.dumps({"model": "base", "stream": True, **LONG, **fields}).encode()
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        assert answer.readline().startswith(b"data: ")
        return connection, answer


def read_stream(answer: http.client.HTTPResponse) -> list[dict[str, Any]]:
    """The chunks that are still to come; the stream must end as streams end."""
    events = [line[6:] for line in answer.read().decode().splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def wait_until(true: Callable[[], bool], *, seconds: float = 10) -> None:
    """Wait for something that another thread does."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


def make_house(root: Path) -> House:
    """Build base and adapters under root."""
    world = make_world(root / "world", rows=1)
    base = describe_base(str(world.root / "base"), world.settings)
    bench = load_workbench(find_base(base, world.settings), base, MACHINE, "fp32")
    house = House(world, base, bench.decoder, bench.renderer(None), Registry(world.settings.registry))
    house.register("low", rank=2, seed=1)
    house.register("high", rank=7, seed=2)
    return house


@contextmanager
def serving(house: House, **changes: Any) -> Iterator[Running]:
    """A server over the house.

    changes: rows, slots, cache_bytes, queue, most_body_bytes, drain_seconds, access, say,
    managing, and fields of Options.
    """
    access: Access | None = changes.pop("access", None)
    say: Callable[[str], None] = changes.pop("say", lambda _text: None)
    managing: Managing | None = changes.pop("managing", None)
    rows, slots = changes.pop("rows", 4), changes.pop("slots", 2)
    cache_bytes = changes.pop("cache_bytes", 1 << 24)
    limits = Limits(rows, CONTEXT, cache_bytes, pass_tokens=64, slots=slots)
    fields = {"queue": 64, "most_body_bytes": 100_000, "drain_seconds": 10.0, **changes}
    bank = AdapterBank(house.base.facts, dtype=torch.float32, device=CPU)
    names = Names(house.registry, house.renderer, base="tiny", base_hash=house.base.base_hash)
    with listen("127.0.0.1", 0) as listening:
        host, _, port = address(listening).removeprefix("http://").partition(":")
        facts = house.base.facts
        options = Options(fingerprint="fp", vocabulary=facts.vocab, hidden=facts.hidden, version="0", **fields)
        tokenizer = house.renderer.tokenizer

        def make_engine(deliver: Deliver, grammars: Grammars) -> EngineLoop:
            read = AdapterReader(house.registry)
            return EngineLoop(
                house.decoder,
                bank,
                limits=limits,
                read=read,
                read_probes=read.probes,
                deliver=deliver,
                guides=grammars,
            )

        server = Server(
            make_engine,
            tokenizer,
            names,
            listening=listening,
            options=options,
            access=access,
            say=say,
            managing=managing,
        )
        server.start()
        worker = threading.Thread(target=server.work)
        worker.start()
        try:
            yield Running(server, host, int(port))
        finally:
            server.end()
            worker.join(timeout=30)
            assert not worker.is_alive()
