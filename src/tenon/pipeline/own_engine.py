"""The engine of this package over a loaded base: in the server's own process, or alone in one for a server's front.

This module does not know HTTP, nor how a batch is made (serve).
"""

from __future__ import annotations

from collections.abc import Iterator

from tenon.data.grammars import Grammars
from tenon.data.render import Renderer
from tenon.errors import PlanError
from tenon.infer.generate import place_bytes
from tenon.models.cache import BLOCK_TOKENS
from tenon.models.decoder import Decoder
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
from tenon.units import format_bytes


def own_engine(request: ServeRequest, emit: Emit, settings: Settings) -> tuple[Renderer, MakeEngines]:
    """The base in this process, how it is asked, and the engine over it. Raises PlanError plan-cache."""
    bench, renderer = open_engine(request.engine, settings, emit, shelf_rank=SLOT_RANK * request.slots)
    bench.decoder.pack()
    limits = cache_limits(request, bench.decoder)
    read = AdapterReader(Registry(settings.registry))

    def make_engines(deliver: Deliver, grammars: Grammars) -> EngineLoop:
        return EngineLoop(
            bench.decoder,
            bench.bank,
            limits=limits,
            read=read,
            read_probes=read.probes,
            deliver=deliver,
            guides=grammars,
        )

    return renderer, make_engines


def run_engine(request: EngineRequest, lines: Iterator[str], emit: Emit, settings: Settings) -> None:
    """Make sequences for a server's front until the lines end. Raises PlanError plan-cache; what loading raises."""
    bench, renderer = open_engine(request.engine, settings, emit, shelf_rank=SLOT_RANK * request.slots)
    bench.decoder.pack()
    process, read = EngineProcess(emit), AdapterReader(Registry(settings.registry))
    engine = EngineLoop(
        bench.decoder,
        bench.bank,
        limits=cache_limits(request, bench.decoder),
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


def cache_limits(request: ServeRequest | EngineRequest, decoder: Decoder) -> Limits:
    """What the engine may use. Raises PlanError plan-cache when the cache does not hold one sequence."""
    context = min(request.context_tokens, decoder.facts.context_tokens)
    one = place_bytes(decoder.facts, tokens=context + BLOCK_TOKENS, dtype=decoder.dtype)
    if request.cache_bytes < one:
        raise PlanError(
            "plan-cache",
            f"a cache of {format_bytes(request.cache_bytes)} does not hold one sequence of {context:,} tokens",
            got=f"{format_bytes(one)} a sequence",
            hint="give more with --cache, or shorter sequences with --context",
        )
    return Limits(
        request.rows,
        context,
        request.cache_bytes,
        PASS_TOKENS[decoder.device.type],
        request.slots,
        request.adapter_bytes,
        request.adapter_wait_seconds,
    )
