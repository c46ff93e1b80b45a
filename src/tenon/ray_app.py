"""The server as an application of Ray Serve, for more than one machine: the same application, names, keys and engine.

    serve run tenon.ray_app:build base=smollm2-135m most=4 gpus=1

Ray starts a replica for as many requests as `ongoing` says, sends each request to one of them, and gives a replica that
is to go `drain` seconds. Every machine has to have the registry at its TENON_HOME: a volume that all of them see. This
module does not know how a replica makes a batch. Needs the extra `ray`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve  # pyright: ignore[reportMissingImports]

from tenon.plan.requests import ServeRequest
from tenon.plan.serving import plan_server
from tenon.registry.store import Registry
from tenon.serve.run import Front
from tenon.service.serving import open_base, public_name
from tenon.settings import read_settings
from tenon.units import parse_bytes

_log = logging.getLogger("ray.serve")
Asgi = Callable[[Any, Any, Any], Awaitable[None]]


class Arguments(BaseModel):
    """What may follow `serve run tenon.ray_app:build`, or stand under `args` in Ray's configuration file.

    base: a base or a recipe; the embedded one without. least, most: replicas. ongoing: requests that a replica is to
    have, on the mean. gpus, cpus: of each replica. slots, rows, context, cache, queue, drain: as of `tenon serve`.
    up_seconds, down_seconds: how long there must be too many or too few requests before Ray changes their number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str | None = None
    least: int = 1
    most: int = 4
    ongoing: float = 8.0
    gpus: float = 0.0
    cpus: float = 1.0
    slots: int = 8
    rows: int = 16
    context: int | None = None
    cache: str | None = None
    queue: int = 1024
    drain: float = 30.0
    up_seconds: float = 10.0
    down_seconds: float = 120.0


def build(args: Arguments) -> serve.Application:
    """The application, for `serve run` and Ray's configuration files."""
    return (
        serve.deployment(serve.ingress(lambda: replica(args))())
        .options(
            name="tenon",
            ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus},
            # Ray's own queue stays short: who is turned away is told so by the replica, as `tenon serve` tells it.
            max_ongoing_requests=args.rows + args.queue,
            graceful_shutdown_timeout_s=args.drain,
            health_check_period_s=5.0,
            autoscaling_config={
                "min_replicas": args.least,
                "initial_replicas": args.least,
                "max_replicas": args.most,
                "target_ongoing_requests": args.ongoing,
                "upscale_delay_s": args.up_seconds,
                "downscale_delay_s": args.down_seconds,
            },
        )
        .bind()
    )


def replica(args: Arguments) -> Asgi:
    """One replica's application, its engine running; planned for the machine that the replica is on."""
    from tenon.pipeline.own_engine import own_engine  # torch: for replicas alone
    from tenon.pipeline.serving import server_options
    from tenon.pipeline.watching import open_watch
    from tenon.serve.front.access import Access
    from tenon.serve.front.names import Names
    from tenon.tenants.keys import KeyStore
    from tenon.tenants.usage import UsageBook

    settings = read_settings()
    engine = open_base(args.base, settings)
    cache_bytes = None if args.cache is None else parse_bytes(args.cache)
    plan = plan_server(engine, slots=args.slots, rows=args.rows, context_tokens=args.context, cache_bytes=cache_bytes)
    request = ServeRequest(
        engine=engine,
        name=public_name(engine.base),
        slots=args.slots,
        rows=args.rows,
        context_tokens=plan.context_tokens,
        cache_bytes=plan.cache_bytes,
        queue=args.queue,
        drain_seconds=args.drain,
    )
    renderer, make_engines = own_engine(request, _tell, settings)
    names = Names(Registry(settings.registry), renderer, base=request.name, base_hash=engine.base.base_hash)
    watch = open_watch(request, settings, renderer.tokenizer, _tell)
    access = Access(KeyStore(settings.keys), UsageBook(settings.usage))
    options = server_options(request, watch)
    front = Front(make_engines, renderer.tokenizer, names, options=options, access=access)
    threading.Thread(target=_run, args=(front,), name="engine", daemon=True).start()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        front.outlet.loop = asyncio.get_running_loop()
        await front.app(scope, receive, send)

    return application


def _run(front: Front) -> None:
    """Make sequences for as long as the process lives. Without an engine it is of no use, so Ray is to replace it."""
    try:
        front.engine.run()
    except BaseException:
        _log.exception("the engine ended")
        raise
    finally:
        os._exit(1)


def _tell(kind: str, /, **fields: Any) -> None:
    _log.info("%s %s", kind, fields)
