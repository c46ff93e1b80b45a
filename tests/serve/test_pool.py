"""Engines in processes of their own, tried out with ones that compute nothing: who is lost, goes on, and is told."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tenon.errors import RunError, TenonError
from tenon.infer.requests import Request, Token
from tenon.plan.requests import EngineRequest
from tenon.processes import Worker, start_worker
from tenon.serve.jobs import AdapterRef, Ended, Event, Failed, Job, Limits, Mailbox
from tenon.serve.pool.fake_engine import FATAL, HANGING, fake_answer
from tenon.serve.pool.metrics import PoolCollector
from tenon.serve.pool.pool import EnginePool, PoolOptions
from tenon.serve.pool.replica import Patience
from tenon.serve.pool.scaling import ScaleRule
from tenon.settings import Settings
from tests.worker.test_loop import ENGINE

QUICK = Patience(backoff_seconds=0.1, silence_seconds=30.0, drain_seconds=20.0)


class Box:
    """A mailbox that keeps everything."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def put(self, event: Event) -> None:
        self.events.append(event)

    @property
    def end(self) -> Event | None:
        return self.events[-1] if self.events and not isinstance(self.events[-1], Token) else None

    @property
    def ids(self) -> list[int]:
        return [event.id for event in self.events if isinstance(event, Token)]


@dataclasses.dataclass
class Pooled:
    """A pool that runs, the processes that it started, and what it said."""

    pool: EnginePool
    workers: list[tuple[int, Worker]]
    said: list[dict[str, Any]]
    raised: list[BaseException]
    thread: threading.Thread

    def ask(self, request: Request, adapter: str | None = None) -> tuple[Job, Box]:
        box = Box()
        asked = Job(request, None if adapter is None else AdapterRef(adapter, f"{adapter}@1"), box)
        self.pool.submit(asked)
        return asked, box

    def alive(self) -> list[Worker]:
        return [worker for _, worker in self.workers if worker.running]


def deliver(letters: list[tuple[Mailbox, Event]]) -> None:
    for mailbox, event in letters:
        mailbox.put(event)


def wait_until(true: Callable[[], bool], *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


@contextmanager
def pooling(
    root: Path, *, rule: ScaleRule, patience: Patience = QUICK, rows: int = 4, worker: str = "tenon.worker.fake"
) -> Iterator[Pooled]:
    settings = Settings(root / "home", root / "cache", offline=True, threads=1, debug=False, worker=worker)
    workers: list[tuple[int, Worker]] = []
    said: list[dict[str, Any]] = []

    def start(number: int) -> Worker:
        started = start_worker("engine", None, settings=settings, log=root / f"engine-{number}-{len(workers)}.log")
        started.send(EngineRequest(engine=ENGINE, rows=rows))
        workers.append((number, started))
        return started

    options = PoolOptions(limits=Limits(rows, 512, 1, 1, 8), scale=rule, patience=patience)
    pool = EnginePool(start, options=options, deliver=deliver, say=said.append)
    raised: list[BaseException] = []

    def run() -> None:
        try:
            pool.run()
        except TenonError as error:
            raised.append(error)

    pool.start()
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield Pooled(pool, workers, said, raised, thread)
    finally:
        pool.stop()
        thread.join(timeout=30)
        assert not thread.is_alive() and not [worker for _, worker in workers if worker.running]


def two(**changes: Any) -> ScaleRule:
    return ScaleRule(**{"least": 2, "most": 2, **changes})


def test_jobs_are_answered_spread_and_cancelled(tmp_path: Path) -> None:
    with pooling(tmp_path, rule=two()) as pooled:
        requests = [Request([5, n], max_new_tokens=8, seed=n) for n in range(20)]
        asked = [pooled.ask(request, "ab"[n % 2] if n % 3 else None) for n, request in enumerate(requests)]
        busy: set[int] = set()
        while any(box.end is None for _, box in asked):
            busy |= {facts.number for facts in pooled.pool.facts.replicas if facts.load.running}
        assert busy == {0, 1}
        for (job, box), request in zip(asked, requests, strict=True):
            assert box.ids == fake_answer(request, job.adapter)
            assert isinstance(box.end, Ended) and list(box.end.completion.ids) == box.ids
            assert box.end.completion.finish == "length" and len(box.end.completion.logprobs) == 8
        assert pooled.pool.resident == {"a", "b"} and pooled.pool.loads >= 2
        pooled.pool.unload("a")
        wait_until(lambda: pooled.pool.resident == {"b"})
        found = PoolCollector(pooled.pool).collect()
        told = {metric.name + "_total" * (metric.type == "counter"): metric for metric in found}
        page = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text()
        assert told.keys() == set(re.findall(r"^- `(tenon_\w+)`", page, flags=re.MULTILINE))
        assert {sample.labels["replica"] for sample in told["tenon_replica_sequences"].samples} == {"0", "1"}
        assert {s.labels["state"]: s.value for s in told["tenon_replicas"].samples if s.value} == {"ready": 2.0}
        long, box = pooled.ask(Request([9], max_new_tokens=5000))
        wait_until(lambda: len(box.events) > 3)
        pooled.pool.cancel(long)
        wait_until(lambda: box.end is not None)
        assert isinstance(box.end, Ended) and box.end.completion.finish == "cancelled"
        pooled.pool.cancel(long)
        left = pooled.ask(Request([9], max_new_tokens=5000))[1]
        wait_until(lambda: bool(left.events))
    assert isinstance(left.end, Failed) and left.end.error.code == "run-stopped"
    assert pooled.said == [] and pooled.raised == []
    assert not list(tmp_path.glob("engine-*.log")), "nothing went wrong"


def test_a_killed_engine_loses_nothing_and_is_replaced(tmp_path: Path) -> None:
    with pooling(tmp_path, rule=two()) as pooled:
        requests = [Request([5, n], max_new_tokens=60, seed=n) for n in range(16)]
        asked = [pooled.ask(request, "abcd"[n % 4]) for n, request in enumerate(requests)]
        wait_until(lambda: sum(bool(box.events) for _, box in asked) >= 6)
        os.kill(pooled.workers[0][1].pid, signal.SIGKILL)
        wait_until(lambda: all(box.end is not None for _, box in asked))
        for (job, box), request in zip(asked, requests, strict=True):
            assert isinstance(box.end, Ended), box.end
            assert box.ids == fake_answer(request, job.adapter) == list(box.end.completion.ids), "no token twice"
        wait_until(lambda: dict(pooled.pool.facts.states).get("ready") == 2)
        assert pooled.pool.facts.retries >= 1 and pooled.pool.facts.restarts == 1
        assert [number for number, _ in pooled.workers] == [0, 1, 0]
    assert [event["code"] for event in pooled.said] == ["run-worker-killed"]


def test_what_cannot_be_gone_on_with_begins_again_and_nothing_is_told_twice(tmp_path: Path) -> None:
    """Scores of a prompt come from reading all of it: such a request is computed from its start, and compared."""
    with pooling(tmp_path, rule=two()) as pooled:
        request = Request([5, 6], max_new_tokens=100, seed=4, prompt_logprobs=True)
        _, box = pooled.ask(request)
        wait_until(lambda: len(box.events) > 10)
        (facts,) = [facts for facts in pooled.pool.facts.replicas if facts.sequences]
        os.kill(dict(pooled.workers)[facts.number].pid, signal.SIGKILL)
        wait_until(lambda: box.end is not None)
        assert box.ids == fake_answer(request) and isinstance(box.end, Ended)


def test_a_request_that_kills_engines_is_given_up_after_two_and_nobody_else_is(tmp_path: Path) -> None:
    with pooling(tmp_path, rule=two()) as pooled:
        good = [pooled.ask(Request([5, n], max_new_tokens=400)) for n in range(4)]
        wait_until(lambda: all(box.events for _, box in good))
        bad = pooled.ask(Request([FATAL, 1], max_new_tokens=5), "nasty")[1]
        wait_until(lambda: bad.end is not None)
        assert isinstance(bad.end, Failed) and bad.end.error.code == "run-request-fatal"
        wait_until(lambda: all(box.end is not None for _, box in good))
        assert all(isinstance(box.end, Ended) for _, box in good)
        assert pooled.pool.facts.restarts == 2
        (named,) = [event["text"] for event in pooled.said if event["code"] == "run-request-fatal"]
        assert "nasty@1" in named and "2 tokens in its prompt" in named


def test_an_engine_that_is_silent_is_replaced(tmp_path: Path) -> None:
    patience = dataclasses.replace(QUICK, silence_seconds=3.0)
    with pooling(tmp_path, rule=two(), patience=patience) as pooled:
        bad = pooled.ask(Request([HANGING], max_new_tokens=5))[1]
        wait_until(lambda: bad.end is not None)
        assert isinstance(bad.end, Failed) and bad.end.error.code == "run-request-fatal"
        assert {event["code"] for event in pooled.said} == {"run-engine-silent", "run-request-fatal"}
        wait_until(lambda: dict(pooled.pool.facts.states).get("ready") == 2)
        good = pooled.ask(Request([5], max_new_tokens=5))[1]
        wait_until(lambda: isinstance(good.end, Ended))


def test_engines_come_when_sequences_wait_and_go_when_none_does(tmp_path: Path) -> None:
    rule = ScaleRule(
        least=1, most=2, up_delay_seconds=0.3, up_seconds=0.3, down_delay_seconds=0.2, down_seconds=1.0, down_share=0.9
    )
    with pooling(tmp_path, rule=rule, rows=1) as pooled:
        asked = [pooled.ask(Request([5, n], max_new_tokens=150)) for n in range(8)]
        wait_until(lambda: dict(pooled.pool.facts.states).get("ready") == 2)
        wait_until(lambda: {f.number for f in pooled.pool.facts.replicas if f.load.running} == {0, 1})
        wait_until(lambda: all(box.end is not None for _, box in asked))
        assert all(isinstance(box.end, Ended) for _, box in asked)
        wait_until(lambda: len(pooled.pool.facts.replicas) == 1)
        assert [event["engines"] for event in pooled.said] == [2, 1]
        assert pooled.pool.facts.restarts == 0
        _, last = pooled.ask(Request([5], max_new_tokens=2))
        wait_until(lambda: isinstance(last.end, Ended))


def test_engines_are_replaced_one_after_the_other_under_load(tmp_path: Path) -> None:
    patience = dataclasses.replace(QUICK, drain_seconds=0.2)
    with pooling(tmp_path, rule=two(), patience=patience) as pooled:
        before = {worker.pid for worker in pooled.alive()}
        requests = [Request([5, n], max_new_tokens=300, seed=n) for n in range(6)]
        asked = [pooled.ask(request) for request in requests]
        wait_until(lambda: all(box.events for _, box in asked))
        pooled.pool.roll()
        least = 2
        while len(pooled.workers) < 4 or dict(pooled.pool.facts.states).get("ready", 0) < 2:
            least = min(least, dict(pooled.pool.facts.states).get("ready", 0))
            time.sleep(0.01)
        assert least == 1, "never none"
        wait_until(lambda: all(box.end is not None for _, box in asked))
        assert [box.ids for _, box in asked] == [fake_answer(request) for request in requests]
        assert not before & {worker.pid for worker in pooled.alive()} and pooled.pool.facts.restarts == 0


def test_a_start_that_fails_says_the_engine_s_own_error(tmp_path: Path) -> None:
    broken = pooling(tmp_path, rule=two(), worker="tenon.worker.absent")
    with pytest.raises(RunError, match="No module named") as error, broken:
        pass
    assert error.value.code == "run-worker-failed"


def test_engines_that_cannot_be_started_again_end_the_server(tmp_path: Path) -> None:
    patience = dataclasses.replace(QUICK, backoff_seconds=0.01, starts=3)
    one = ScaleRule(least=1, most=1)
    with pooling(tmp_path, rule=one, patience=patience) as pooled:
        began = time.monotonic()
        while pooled.thread.is_alive():
            for worker in pooled.alive():
                worker.kill()
            time.sleep(0.01)
        assert [type(error) for error in pooled.raised] == [RunError] and time.monotonic() - began < 60
        assert pooled.pool.facts.restarts >= 2
