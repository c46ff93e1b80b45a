"""Serving: the base is loaded once, adapters come and go beside it, requests arrive over HTTP.

This module does not know HTTP or how a batch is made (serve).
"""

from __future__ import annotations

from contextlib import closing
from importlib import metadata

from tenon.data.grammars import Grammars
from tenon.data.render import Renderer
from tenon.errors import PlanError
from tenon.infer.generate import place_bytes
from tenon.models.cache import BLOCK_TOKENS
from tenon.models.decoder import Decoder
from tenon.pipeline.foreign import foreign_engines
from tenon.pipeline.slot_data import Emit
from tenon.pipeline.talking import open_engine
from tenon.pipeline.watching import open_watch
from tenon.plan.requests import ServeRequest
from tenon.registry.store import Registry
from tenon.serve.access import Access
from tenon.serve.adapter_files import AdapterReader
from tenon.serve.connections import Bounds, raise_handles
from tenon.serve.engine_loop import EngineLoop
from tenon.serve.jobs import Deliver, Limits
from tenon.serve.names import Names
from tenon.serve.run import MakeEngines, Options, Server, address, listen, stopped_by_signals
from tenon.settings import Settings
from tenon.tenants.keys import KeyStore
from tenon.tenants.usage import UsageBook
from tenon.units import format_bytes

# Most tokens of one pass: a long prompt must not keep those who wait for their next token.
_PASS_TOKENS = {"cpu": 256, "cuda": 2048}


def serve(request: ServeRequest, emit: Emit, settings: Settings) -> None:
    """Serve until SIGTERM. Raises UsageError usage-address before anything is loaded; PlanError plan-cache; what
    `foreign_engines` raises.
    """
    with listen(request.host, request.port) as listening:
        if request.foreign is None:
            renderer, make_engines = _own_engines(request, emit, settings)
        else:
            renderer, make_engines = foreign_engines(request, request.foreign, emit, settings)
        registry = Registry(settings.registry)
        names = Names(registry, renderer, base=request.name, base_hash=request.engine.base.base_hash)
        watch = open_watch(request, settings, renderer.tokenizer, emit)
        options = Options(
            queue=request.queue,
            most_body_bytes=request.most_body_bytes,
            drain_seconds=request.drain_seconds,
            fingerprint=request.engine.base.base_hash[:12],
            vocabulary=request.engine.facts.vocab,
            hidden=request.engine.facts.hidden,
            version=metadata.version("tenonlm"),
            cors=request.cors,
            bounds=Bounds(most_connections=raise_handles()),
            observers=watch.observers,
            keep_prompts=request.log_prompts,
        )
        access = Access(KeyStore(settings.keys), UsageBook(settings.usage))

        def say(text: str) -> None:
            emit("warning", code="alias", text=text)

        server = Server(
            make_engines,
            renderer.tokenizer,
            names,
            listening=listening,
            options=options,
            access=access,
            say=say,
        )
        with closing(access), closing(watch), stopped_by_signals(server):
            server.start()
            limits = server.engine.limits
            told = {"rows": limits.rows, "context_tokens": limits.context_tokens, "slots": limits.slots}
            emit("ready", url=address(listening), name=request.name, **told)
            server.work()


def _own_engines(request: ServeRequest, emit: Emit, settings: Settings) -> tuple[Renderer, MakeEngines]:
    """The base in this process, how it is asked, and the engine over it."""
    bench, renderer = open_engine(request.engine, settings, emit)
    bench.decoder.pack()
    limits = cache_limits(request, bench.decoder)
    read = AdapterReader(Registry(settings.registry))

    def make_engines(deliver: Deliver, grammars: Grammars) -> EngineLoop:
        return EngineLoop(bench.decoder, bench.bank, limits=limits, read=read, deliver=deliver, guides=grammars)

    return renderer, make_engines


def cache_limits(request: ServeRequest, decoder: Decoder) -> Limits:
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
    return Limits(request.rows, context, request.cache_bytes, _PASS_TOKENS[decoder.device.type], request.slots)
