"""Serving: names, keys, text and HTTP in this process, before whoever makes the sequences.

This module never imports torch: what computes is imported when it is to be in this process. It does not know how a
batch is made.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib import metadata
from types import FrameType

from tenon.data.render import Renderer
from tenon.pipeline.heap import settle_heap
from tenon.pipeline.slot_data import Emit
from tenon.pipeline.watching import Watch, open_watch
from tenon.plan.requests import ServeRequest
from tenon.registry.store import Registry
from tenon.serve.front.access import Access
from tenon.serve.front.names import Names
from tenon.serve.http.connections import Bounds, raise_handles
from tenon.serve.pool.metrics import PoolCollector
from tenon.serve.pool.pool import EnginePool
from tenon.serve.run import MakeEngines, Managing, Options, Server, address, listen, stopped_by_signals
from tenon.settings import Settings
from tenon.tenants.keys import KeyStore
from tenon.tenants.usage import UsageBook, UsageReader


def serve(request: ServeRequest, emit: Emit, settings: Settings) -> None:
    """Serve until SIGTERM. Raises UsageError usage-address before anything is loaded; what `own_engine`,
    `foreign_engines` and `replica_engines` raise.
    """
    with listen(request.host, request.port) as listening, _managing(request, settings) as managing:
        renderer, make_engines = _engines(request, emit, settings)
        registry = Registry(settings.registry)
        names = Names(registry, renderer, base=request.name, base_hash=request.engine.base.base_hash)
        watch = open_watch(request, settings, renderer.tokenizer, emit)
        options = server_options(request, watch)
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
            managing=managing,
        )
        with closing(access), closing(watch), stopped_by_signals(server), _pooled(server):
            server.start()
            limits = server.engine.limits
            told = {"rows": limits.rows, "context_tokens": limits.context_tokens, "slots": limits.slots}
            replicas = 1 if request.replicas is None else request.replicas.least
            manage = None if managing is None else address(managing.listening)
            settle_heap()
            emit("ready", url=address(listening), manage=manage, name=request.name, replicas=replicas, **told)
            server.work()


@contextmanager
def _managing(request: ServeRequest, settings: Settings) -> Iterator[Managing | None]:
    """The management API where it is asked for. Raises UsageError usage-address."""
    if request.manage_port is None:
        yield None
        return
    with listen(request.manage_host, request.manage_port) as listening:
        yield Managing(listening, Registry(settings.registry), KeyStore(settings.keys), UsageReader(settings.usage))


def server_options(request: ServeRequest, watch: Watch) -> Options:
    """What a server is to keep to. watch: who is told of each request."""
    return Options(
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


def _engines(request: ServeRequest, emit: Emit, settings: Settings) -> tuple[Renderer, MakeEngines]:
    """How the base is asked, and whoever makes the sequences."""
    if request.foreign is not None:
        from tenon.pipeline.foreign import foreign_engines

        return foreign_engines(request, request.foreign, emit, settings)
    if request.replicas is not None:
        from tenon.pipeline.replicas import replica_engines

        return replica_engines(request, request.replicas, emit, settings)
    from tenon.pipeline.own_engine import own_engine

    return own_engine(request, emit, settings)


@contextmanager
def _pooled(server: Server) -> Iterator[None]:
    """Where engines are processes of their own: their metrics, and SIGUSR1, which replaces them. Main thread only."""
    pool = server.engine
    if not isinstance(pool, EnginePool):
        yield
        return

    def roll(_number: int, _frame: FrameType | None) -> None:
        pool.roll()

    server.gate.metrics.add(PoolCollector(pool))
    before = signal.signal(signal.SIGUSR1, roll)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)
