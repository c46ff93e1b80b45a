"""Several engines for one server: a process each, on a GPU of its own or with its part of a CPU's threads.

This module never imports torch, and does not know how the engines are watched (serve.pool) nor HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tenon.data.grammars import Grammars
from tenon.data.render import Renderer
from tenon.data.template import read_template
from tenon.data.tokenizer import load_tokenizer
from tenon.pipeline.base import find_base
from tenon.pipeline.slot_data import Emit
from tenon.plan.requests import EngineRequest, Replicas, ServeRequest
from tenon.processes import Worker, start_worker
from tenon.serve.jobs import Deliver, Limits
from tenon.serve.pool.pool import EnginePool, PoolOptions
from tenon.serve.pool.replica import Patience, StartEngine
from tenon.serve.pool.scaling import ScaleRule
from tenon.serve.run import MakeEngines
from tenon.settings import Settings


def replica_engines(
    request: ServeRequest, replicas: Replicas, emit: Emit, settings: Settings
) -> tuple[Renderer, MakeEngines]:
    """How the base is asked, and engines that answer by the time they are made. Raises what an engine raises."""
    emit("phase", name="base", detail=request.engine.base.spec)
    folder = find_base(request.engine.base, settings)
    renderer = Renderer(load_tokenizer(folder), read_template(request.engine.template))
    options = _options(request, replicas)

    def make_engines(deliver: Deliver, _grammars: Grammars) -> EnginePool:  # each engine compiles its own
        emit("phase", name="engines", detail=f"{replicas.least} of {request.engine.base.spec}")
        start = engine_starter(request, replicas, settings)
        pool = EnginePool(start, options=options, deliver=deliver, say=_told_by(emit))
        pool.start()
        return pool

    return renderer, make_engines


def engine_starter(request: ServeRequest, replicas: Replicas, settings: Settings) -> StartEngine:
    """What starts the engine of a seat, with its own GPU or its own threads, and its own log."""

    def start(number: int) -> Worker:
        seat = replicas.seats[number]
        devices = settings.visible_devices if seat.visible_devices is None else seat.visible_devices
        own = replace(settings, threads=seat.machine.threads, visible_devices=devices)
        log = settings.home / "logs" / f"engine-{number}-{time.strftime('%Y%m%d-%H%M%S')}-{time.monotonic_ns()}.log"
        worker = start_worker("engine", None, settings=own, log=log)
        worker.send(
            EngineRequest(
                engine=request.engine.model_copy(update={"machine": seat.machine}),
                slots=request.slots,
                adapter_bytes=request.adapter_bytes,
                adapter_wait_seconds=request.adapter_wait_seconds,
                rows=request.rows,
                context_tokens=request.context_tokens,
                cache_bytes=request.cache_bytes,
            )
        )
        return worker

    return start


def _options(request: ServeRequest, replicas: Replicas) -> PoolOptions:
    return PoolOptions(
        # What a pass takes is each engine's own affair.
        limits=Limits(request.rows, request.context_tokens, request.cache_bytes, 0, request.slots),
        scale=ScaleRule(
            least=replicas.least,
            most=len(replicas.seats),
            up_delay_seconds=replicas.up_delay_seconds,
            up_seconds=replicas.up_seconds,
            down_delay_seconds=replicas.up_delay_seconds / 10,
            down_seconds=replicas.down_seconds,
        ),
        patience=Patience(silence_seconds=replicas.silence_seconds, drain_seconds=request.drain_seconds),
    )


def _told_by(emit: Emit) -> Callable[[dict[str, Any]], None]:
    """Events of engines as events of the server. Their phases are left out: there are as many of each as engines."""

    def say(event: dict[str, Any]) -> None:
        if event["kind"] in ("warning", "scale"):
            emit(event["kind"], **{name: value for name, value in event.items() if name not in ("kind", "t")})

    return say
