"""The engine's thread by itself: jobs in, events out, without text and without HTTP."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tenon.adapters.bank import AdapterBank
from tenon.adapters.peft_files import AdapterFiles, read_adapter
from tenon.errors import AdapterError
from tenon.infer.requests import Request, Token
from tenon.serve.engine.loop import EngineLoop
from tenon.serve.jobs import AdapterRef, Ended, Event, Failed, Job, Limits, Mailbox
from tests.serve.house import House, wait_until
from tests.tiny import CPU

PROMPT = [5, 40, 90, 12]


class Box:
    """A mailbox that keeps everything."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def put(self, event: Event) -> None:
        self.events.append(event)

    @property
    def last(self) -> Event | None:
        return self.events[-1] if self.events and not isinstance(self.events[-1], Token) else None


def deliver(letters: list[tuple[Mailbox, Event]]) -> None:
    for mailbox, event in letters:
        mailbox.put(event)


@contextmanager
def working(house: House, *, rows: int = 3, slots: int = 1) -> Iterator[EngineLoop]:
    def read(adapter: AdapterRef) -> AdapterFiles:
        if adapter.key == "broken":
            raise AdapterError("adapter-damaged", "broken", hint="none")
        return read_adapter(house.registry.folder(house.registry.get(adapter.label)))

    bank = AdapterBank(house.base.facts, dtype=torch.float32, device=CPU)
    loop = EngineLoop(house.decoder, bank, limits=Limits(rows, 128, 1 << 24, 32, slots), read=read, deliver=deliver)
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        yield loop
    finally:
        loop.stop()
        thread.join(timeout=20)
        assert not thread.is_alive()


def job(name: str | None, *, tokens: int = 10) -> tuple[Job, Box]:
    box = Box()
    adapter = None if name is None else AdapterRef(name, name)
    return Job(Request(PROMPT, max_new_tokens=tokens), adapter, box), box


def test_jobs_wait_for_a_slot_and_others_pass_them_by(house: House) -> None:
    with working(house, slots=1) as loop:
        long, long_box = job("low", tokens=100)
        loop.submit(long)
        wait_until(lambda: bool(long_box.events))
        asked = [job("high"), job(None), job("low"), job("high")]
        for each, _ in asked:
            loop.submit(each)
        wait_until(lambda: asked[1][1].last is not None and asked[2][1].last is not None)
        assert asked[0][1].events == [] and loop.load.parked == 2 and loop.resident == {"low"}
        loop.cancel(long)
        wait_until(lambda: asked[0][1].last is not None and asked[3][1].last is not None)
        assert loop.resident == {"high"} and loop.loads == 2
    names = ["high", None, "low", "high"]
    expected = house.expected([PROMPT] * 4, names, max_new_tokens=10, stop_ids=frozenset())
    for (_, box), completion in zip(asked, expected, strict=True):
        assert isinstance(box.last, Ended) and box.last.completion.ids == completion.ids
        assert [event.id for event in box.events if isinstance(event, Token)] == list(completion.ids)
    assert isinstance(long_box.last, Ended) and long_box.last.completion.finish == "cancelled"


def test_every_job_of_a_refused_adapter_is_told(house: House) -> None:
    with working(house) as loop:
        asked = [job("broken"), job("broken"), job(None)]
        for each, _ in asked:
            loop.submit(each)
        wait_until(lambda: all(box.last is not None for _, box in asked))
    for _, box in asked[:2]:
        assert isinstance(box.last, Failed) and box.last.error.code == "adapter-damaged"
    assert isinstance(asked[2][1].last, Ended)


def test_a_parked_job_can_be_cancelled(house: House) -> None:
    with working(house, slots=1) as loop:
        long, long_box = job("low", tokens=100)
        parked, box = job("high")
        loop.submit(long)
        wait_until(lambda: bool(long_box.events))
        loop.submit(parked)
        wait_until(lambda: loop.load.parked == 1)
        loop.cancel(parked)
        wait_until(lambda: box.last is not None and loop.load.parked == 0)
        loop.cancel(parked)


def test_whoever_is_left_when_it_ends_is_told(house: House) -> None:
    with working(house, rows=1) as loop:
        asked = [job(None, tokens=120), job(None), job("low")]
        for each, _ in asked:
            loop.submit(each)
        wait_until(lambda: bool(asked[0][1].events))
    for _, box in asked:
        assert isinstance(box.last, Failed) and box.last.error.code == "run-stopped"


def test_a_decoder_that_breaks_ends_the_loop_and_everybody_is_told(house: House) -> None:
    bank = AdapterBank(house.base.facts, dtype=torch.float32, device=CPU)
    loop = EngineLoop(house.decoder, bank, limits=Limits(1, 64, 1 << 24, 32, 1), read=None, deliver=deliver)  # pyright: ignore
    box = Box()
    loop.submit(Job(Request([10_000]), None, box))  # a token that no embedding has
    with pytest.raises(IndexError):
        loop.run()
    assert isinstance(box.last, Failed)


def test_what_waits_is_let_in_when_all_that_ran_has_ended(house: House) -> None:
    """Nobody says anything at that moment: the loop must look for itself."""
    with working(house, rows=1, slots=1) as loop:
        asked = [job("low", tokens=3), job(None, tokens=3), job("high", tokens=3), job("low", tokens=3)]
        for each, _ in asked:
            loop.submit(each)
        wait_until(lambda: all(isinstance(box.last, Ended) for _, box in asked))
        assert loop.load.adapters.evictions >= 1 and loop.load.adapters.from_disk >= 1


def test_ends_tell_what_was_waited_for(house: House) -> None:
    """The adapter until its slot was there, then a place in the batch; a preempted row's first place counts."""
    with working(house, rows=2, slots=1) as loop:
        asked = [job("low", tokens=60), job("high"), job(None, tokens=60), job(None)]
        for each, _ in asked:
            loop.submit(each)
        wait_until(lambda: all(isinstance(box.last, Ended) for _, box in asked))
        longest = loop.load.adapters.most_wait_seconds
    low, high, first, second = [box.last.waits for _, box in asked if isinstance(box.last, Ended)]
    assert low and high and first and second
    assert high.adapter_seconds == longest > low.adapter_seconds > 0
    assert first.adapter_seconds == second.adapter_seconds == 0
    assert second.place_seconds > first.place_seconds >= 0
