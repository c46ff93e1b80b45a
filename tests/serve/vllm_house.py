"""The house served by the stand-in for vLLM (tests/fakes/vllm_site), which is started as vLLM would be."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tenon.errors import StopRequestedError
from tenon.infer.requests import Request, Token
from tenon.pipeline.foreign import start_vllm
from tenon.serve.engine.adapter_files import AdapterReader
from tenon.serve.jobs import AdapterRef, Ended, Event, Failed, Job, Limits, Mailbox
from tenon.serve.vllm.adapters import VllmAdapters
from tenon.serve.vllm.engines import VllmEngines
from tenon.serve.vllm.process import Launch, VllmProcess
from tests.serve.house import CONTEXT, House

SITE = Path(__file__).parents[1] / "fakes" / "vllm_site"


class Box:
    """A mailbox that can be waited for."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = threading.Condition()

    def put(self, event: Event) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def wait(self, true: Callable[[list[Event]], bool], *, seconds: float = 20) -> list[Event]:
        with self._changed:
            assert self._changed.wait_for(lambda: true(self.events), seconds), self.events
            return list(self.events)

    def end(self) -> Ended | Failed:
        """The last event, once it has come."""
        last = self.wait(lambda events: bool(events) and not isinstance(events[-1], Token))[-1]
        assert isinstance(last, Ended | Failed)
        return last

    def tokens(self, count: int) -> None:
        """Wait for so many tokens."""
        self.wait(lambda events: len(events) >= count)


@dataclass
class Foreign:
    """A stand-in that runs. log: what it was asked. told: what the operator was told."""

    house: House
    engines: VllmEngines
    process: VllmProcess
    folder: Path
    told: list[str]
    starts: list[VllmProcess] = field(default_factory=list)

    def ask(self, prompt: list[int], adapter: str | None = None, **fields: Any) -> tuple[Job, Box]:
        """Have a sequence made."""
        ref = None
        if adapter is not None:
            entry = self.house.registry.get(adapter)
            ref = AdapterRef(entry.adapter_hash, entry.label)
        box = Box()
        job = Job(Request(prompt, **{"max_new_tokens": 4, **fields}), ref, box)
        self.engines.submit(job)
        return job, box

    def asked(self, route: str) -> list[dict[str, Any]]:
        """What came by a route so far."""
        lines = (self.folder / "asked.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["route"] == route]

    def have_mercy(self) -> None:
        """From now on it dies of no prompt."""
        (self.folder / "mercy").touch()


def make_launch(house: House, folder: Path, **changes: Any) -> Launch:
    """The stand-in's command. changes: fields of Launch, and FAKE_VLLM_ variables."""
    variables = {name: str(changes.pop(name)) for name in list(changes) if name.startswith("FAKE_")}
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(SITE),
        "FAKE_VLLM_LOG": str(folder / "asked.jsonl"),
        "FAKE_VLLM_MERCY": str(folder / "mercy"),
        **variables,
    }
    fields = {"context_tokens": CONTEXT, "rows": 4, "slots": 2, "cache_bytes": 1 << 24, **changes}
    return Launch(Path(sys.executable), house.world.root / "base", folder / "vllm.log", environment, **fields)


def deliver(letters: list[tuple[Mailbox, Event]], /) -> None:
    """At once."""
    for mailbox, event in letters:
        mailbox.put(event)


@contextmanager
def foreign(
    house: House,
    folder: Path,
    *,
    patience_seconds: float = 0.3,
    base_by_adapter: bool = False,
    without: tuple[str, ...] = (),
    **changes: Any,
) -> Iterator[Foreign]:
    """Engines over a stand-in. changes: see `make_launch`."""
    launch = make_launch(house, folder, **changes)
    told: list[str] = []
    starts: list[VllmProcess] = []

    def start(on_wait: Callable[[], None]) -> VllmProcess:
        starts.append(start_vllm(launch, on_wait))
        return starts[-1]

    adapters = VllmAdapters(
        folder / "adapters",
        house.base.facts,
        slots=launch.slots - base_by_adapter,
        max_rank=launch.max_rank,
        read=AdapterReader(house.registry),
        base_by_adapter=base_by_adapter,
        patience_seconds=patience_seconds,
    )
    limits = Limits(launch.rows, CONTEXT, launch.cache_bytes, 64, launch.slots)
    process = start(lambda: None)
    engines = VllmEngines(
        start, process, limits=limits, adapters=adapters, deliver=deliver, tell=told.append, without=without
    )
    owner = threading.Thread(target=engines.run)
    owner.start()
    try:
        yield Foreign(house, engines, process, folder, told, starts)
    finally:
        engines.stop()
        owner.join(timeout=30)
        assert not owner.is_alive()


def never() -> None:
    """What to do while waiting: nothing any more."""
    raise StopRequestedError("run-stopped", "stopped", hint="start it again")
