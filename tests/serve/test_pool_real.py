"""Real engines over a real base, killed while they answer: SmolLM2-135M in two processes."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tenon.infer.requests import Request
from tenon.pipeline.replicas import engine_starter
from tenon.plan.requests import Replicas, Seat, ServeRequest
from tenon.processes import Worker
from tenon.serve.jobs import Ended, Job, Limits
from tenon.serve.pool.pool import EnginePool, PoolOptions
from tenon.serve.pool.replica import Patience
from tenon.serve.pool.scaling import ScaleRule
from tenon.service.serving import open_base
from tenon.settings import Settings, read_settings
from tests.serve.test_pool import Box, deliver, wait_until

TOKENS, ROWS = 24, 4


@contextmanager
def running(settings: Settings) -> Iterator[tuple[EnginePool, list[int]]]:
    """Two engines with a thread each, and the processes that were started."""
    engine = open_base(None, settings)
    seat = Seat(machine=engine.machine.model_copy(update={"threads": 1}))
    request = ServeRequest(engine=engine, name="base", rows=ROWS, context_tokens=256, cache_bytes=1 << 28)
    start = engine_starter(request, Replicas(seats=(seat, seat), least=2), settings)
    pids: list[int] = []

    def started(number: int) -> Worker:
        worker = start(number)
        pids.append(worker.pid)
        return worker

    options = PoolOptions(
        limits=Limits(ROWS, 256, 1 << 28, 0, 8),
        scale=ScaleRule(least=2, most=2),
        patience=Patience(backoff_seconds=0.5, silence_seconds=600.0),
    )
    pool = EnginePool(started, options=options, deliver=deliver, say=lambda event: None)
    pool.start()
    thread = threading.Thread(target=pool.run)
    thread.start()
    try:
        yield pool, pids
    finally:
        pool.stop()
        thread.join(timeout=60)
        assert not thread.is_alive()


def requests() -> list[Request]:
    """Greedy and drawn ones, more than both engines have places for."""
    draw = random.Random(7)
    prompts = [[draw.randrange(1000, 20_000) for _ in range(draw.randint(6, 30))] for _ in range(3 * ROWS)]
    return [
        Request(prompt, max_new_tokens=TOKENS, temperature=0.9 * (n % 2), top_p=0.95, seed=n)
        for n, prompt in enumerate(prompts)
    ]


def ask(pool: EnginePool) -> list[Box]:
    boxes = [Box() for _ in requests()]
    for request, box in zip(requests(), boxes, strict=True):
        pool.submit(Job(request, None, box))
    return boxes


@pytest.mark.slow
def test_a_killed_engine_s_answers_go_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """The dequantised base is the machine's; all else is the test's own."""
    settings = replace(read_settings(), home=tmp_path / "home", offline=True, threads=1)
    with running(settings) as (pool, pids):
        calm = ask(pool)
        wait_until(lambda: all(box.end is not None for box in calm), seconds=300)
        shaken = ask(pool)
        wait_until(lambda: sum(len(box.events) > 3 for box in shaken) >= ROWS + 1, seconds=300)
        before = [len(box.ids) for box in shaken]
        os.kill(pids[0], signal.SIGKILL)
        wait_until(lambda: all(box.end is not None for box in shaken), seconds=300)
        assert pool.facts.restarts == 1 and pool.facts.retries >= 1
    assert 0 in before and max(before) > 3, "some had begun, others had not"
    for quiet, disturbed in zip(calm, shaken, strict=True):
        assert isinstance(disturbed.end, Ended), disturbed.end
        assert disturbed.ids == quiet.ids == list(disturbed.end.completion.ids) and len(quiet.ids) == TOKENS
