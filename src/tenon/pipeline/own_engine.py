"""The engine of this package over a loaded base: in the server's own process, or alone in one for a server's front.

This module does not know HTTP, nor how a batch is made (serve).
"""

from __future__ import annotations

from collections.abc import Iterator

from tenon.data.grammars import Grammars
from tenon.data.render import Renderer
from tenon.pipeline.heap import settle_heap
from tenon.pipeline.slot_data import Emit
from tenon.pipeline.talking import open_engine
from tenon.plan.requests import EngineRequest, ServeRequest
from tenon.plan.serving import PASS_TOKENS, SLOT_RANK
from tenon.registry.store import Registry
from tenon.serve.engine.adapter_files import AdapterReader
from tenon.serve.engine.loop import EngineLoop
from tenon.serve.jobs import Deliver, Limits
from tenon.serve.pool.engine_process import EngineProcess
from tenon.serve.run import MakeEngines
from tenon.settings import Settings


def own_engine(request: ServeRequest, emit: Emit, settings: Settings) -> tuple[Renderer, MakeEngines]:
    """The base in this process, how it is asked, and the engine over it. Raises what loading raises."""
    bench, renderer = open_engine(request.engine, settings, emit, shelf_rank=SLOT_RANK * request.slots)
    bench.decoder.pack()
    read = AdapterReader(Registry(settings.registry))

    def make_engines(deliver: Deliver, grammars: Grammars) -> EngineLoop:
        return EngineLoop(
            bench.decoder,
            bench.bank,
            limits=_limits(request),
            read=read,
            read_probes=read.probes,
            deliver=deliver,
            guides=grammars,
        )

    return renderer, make_engines


def run_engine(request: EngineRequest, lines: Iterator[str], emit: Emit, settings: Settings) -> None:
    """Make sequences for a server's front until the lines end. Raises what loading raises."""
    bench, renderer = open_engine(request.engine, settings, emit, shelf_rank=SLOT_RANK * request.slots)
    bench.decoder.pack()
    process, read = EngineProcess(emit), AdapterReader(Registry(settings.registry))
    engine = EngineLoop(
        bench.decoder,
        bench.bank,
        limits=_limits(request),
        read=read,
        read_probes=read.probes,
        deliver=process.deliver,
        guides=Grammars(renderer.tokenizer, vocabulary=bench.decoder.facts.vocab),
        on_start=process.on_start,
        on_turn=process.on_turn,
    )
    settle_heap()
    emit("ready")
    process.run(engine, lines)


def _limits(request: ServeRequest | EngineRequest) -> Limits:
    """What the engine may use, as it was planned."""
    return Limits(
        request.rows,
        request.context_tokens,
        request.cache_bytes,
        PASS_TOKENS[request.engine.machine.device],
        request.slots,
        request.adapter_bytes,
        request.adapter_wait_seconds,
    )
