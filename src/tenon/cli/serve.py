"""`tenon serve`: one resident base and every adapter that stands on it, behind OpenAI's API."""

from __future__ import annotations

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tenon.cli.session import Session, session_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tenon.cli.live import View
    from tenon.plan.requests import ServeRequest
    from tenon.processes import Event


class BasePrecision(StrEnum):
    """What the base is kept in."""

    auto = "auto"
    same = "same"
    fp8 = "fp8"
    int8 = "int8"
    nf4 = "nf4"


class EngineName(StrEnum):
    """Who makes the answers."""

    tenon = "tenon"
    vllm = "vllm"


_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    ctx: typer.Context,
    spec: Annotated[
        str | None,
        typer.Argument(metavar="BASE", help="A base, or a recipe (.yaml) for its base; by default the embedded one."),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    slots: Annotated[int, typer.Option("--slots", min=1, max=1024, help="Adapters in use at a time.")] = 8,
    adapter_memory: Annotated[
        str, typer.Option("--adapter-memory", help="Host memory for adapters beside the slots, read and ready.")
    ] = "2GB",
    adapter_wait: Annotated[
        float,
        typer.Option(
            "--adapter-wait", min=0.0, help="Seconds that an adapter waits for a slot before one is closed for it."
        ),
    ] = 5.0,
    rows: Annotated[int, typer.Option("--rows", min=1, max=1024, help="Most sequences at a time.")] = 16,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            min=16,
            help="Longest sequence in tokens, prompt and answer together; by default 4096, or what the base can read.",
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            "--cache",
            help="Memory for keys and values, of each engine; when it is full, the youngest sequences wait. By default "
            "2GB, or what is left where that is less.",
        ),
    ] = None,
    base_precision: Annotated[
        BasePrecision | None,
        typer.Option(
            "--base-precision",
            help="What the base's linear layers are kept in; by default as the recipe says, or as there is room.",
        ),
    ] = None,
    queue: Annotated[int, typer.Option("--queue", min=0, help="Sequences that may wait; more are refused.")] = 1024,
    drain: Annotated[
        float, typer.Option("--drain", min=0.0, help="Seconds in which what runs may finish after SIGTERM.")
    ] = 30.0,
    cors: Annotated[
        list[str] | None,
        typer.Option("--cors", help="Origin of web pages that may ask, https://chat.example.org; again for more."),
    ] = None,
    engine_name: Annotated[
        EngineName, typer.Option("--engine", help="Who makes the answers: Tenon, or vLLM in an environment of its own.")
    ] = EngineName.tenon,
    engine_python: Annotated[
        Path | None,
        typer.Option("--engine-python", help="Python of vLLM's environment; by default engines/vllm in TENON_HOME."),
    ] = None,
    engine_options: Annotated[
        str, typer.Option("--engine-options", help="Further options for vLLM, in one word: '--tensor-parallel-size 2'.")
    ] = "",
    manage: Annotated[
        int | None,
        typer.Option(
            "--manage", metavar="PORT", min=0, max=65535, help="Port of the management API; without it there is none."
        ),
    ] = None,
    manage_host: Annotated[
        str, typer.Option("--manage-host", help="Address that the management API listens on.")
    ] = "127.0.0.1",
    log: Annotated[
        str | None,
        typer.Option("--log", metavar="FILE", help="A line of JSON for each request; - for standard output."),
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Prompts too, in the log and in traces.")] = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="OpenTelemetry spans to OTEL_EXPORTER_OTLP_ENDPOINT (extra `trace`).")
    ] = False,
    replicas: Annotated[
        str,
        typer.Option(
            "--replicas",
            metavar="N|A-B|auto",
            help="Engines, each in a process of its own with its own GPU or part of the CPU; A-B: as many as are "
            "needed; auto: one a GPU. 1 is one in the server's own process.",
        ),
    ] = "1",
    queue_delay: Annotated[
        float, typer.Option("--queue-delay", min=0.01, help="Wait in seconds that brings another of A-B replicas.")
    ] = 1.0,
    silence: Annotated[
        float, typer.Option("--silence", min=1.0, help="Seconds after which a replica that says nothing is replaced.")
    ] = 120.0,
    as_json: Annotated[bool, typer.Option("--json", help="Events as JSON lines on standard output.")] = False,
) -> None:
    """Serve a base and every registered adapter that stands on it, over OpenAI's API.

    `model` is the base's name, an adapter's NAME (its newest version) or NAME@VERSION; what is registered later answers
    too. SIGTERM and Ctrl-C take nothing new and let what runs finish; a second Ctrl-C ends at once. SIGUSR1 replaces
    the replicas by new ones, one after the other.
    """
    from tenon.plan.replicas import plan_replicas
    from tenon.plan.requests import ServeRequest
    from tenon.plan.serving import plan_server
    from tenon.service.environment import require_tracing
    from tenon.service.foreign import find_vllm
    from tenon.service.serving import open_base, public_name

    session = session_of(ctx)
    asked_cache = None if cache is None else _parse_size(cache, "--cache")
    adapter_bytes = _parse_size(adapter_memory, "--adapter-memory")
    _require_own_options(engine_name, engine_python, engine_options, replicas)
    foreign = None
    if engine_name is EngineName.vllm:
        foreign = find_vllm(engine_python, engine_options, session.settings)
    if trace:
        require_tracing()
    engine = open_base(spec, session.settings, base_precision=None if base_precision is None else base_precision.value)
    several = plan_replicas(
        replicas,
        engine,
        visible_devices=session.settings.visible_devices,
        queue_delay_seconds=queue_delay,
        silence_seconds=silence,
    )
    plan = plan_server(
        engine,
        slots=slots,
        rows=rows,
        context_tokens=context,
        cache_bytes=asked_cache,
        replicas=several,
        by_vllm=foreign is not None,
    )
    request = ServeRequest(
        engine=engine,
        name=public_name(engine.base),
        host=host,
        port=port,
        slots=slots,
        adapter_bytes=adapter_bytes,
        adapter_wait_seconds=adapter_wait,
        rows=rows,
        context_tokens=plan.context_tokens,
        cache_bytes=plan.cache_bytes,
        queue=queue,
        drain_seconds=drain,
        cors=tuple(cors or ()),
        foreign=foreign,
        log=None if log is None else log if log == "-" else str(Path(log).absolute()),
        log_prompts=log_prompts,
        trace=trace,
        replicas=several,
        manage_host=manage_host,
        manage_port=manage,
    )
    if host not in _LOOPBACK and not session.settings.keys.is_file():
        text = f"whoever reaches {host} can use this server: no key is asked for; make one: tenon keys create TENANT"
        session.err.print(text, style="yellow")
    if plan.memory is not None:
        session.err.print(f"memory: {plan.memory}", style="dim")
    _listen(session, request, as_json=as_json)


def _require_own_options(engine: EngineName, python: Path | None, options: str, replicas: str) -> None:
    """Refuse options that are another engine's. Raises BadParameter."""
    if engine is not EngineName.vllm and (python is not None or options):
        raise typer.BadParameter(
            "is for another engine: add --engine vllm", param_hint="--engine-python, --engine-options"
        )
    if engine is EngineName.vllm and replicas != "1":
        text = "are of Tenon's own engine: for vLLM type --engine-options '--data-parallel-size 2'"
        raise typer.BadParameter(text, param_hint="--replicas")


def _listen(session: Session, request: ServeRequest, *, as_json: bool) -> None:
    """Start the server, say where it is, and tell what it tells until it has ended."""
    from tenon.cli.live import make_view
    from tenon.service.serving import Serving, stopped_by_signals

    serving = Serving(request, session.settings)

    def on_stop(first: bool) -> None:
        # In a signal handler: whatever was being printed or imported is interrupted, so nothing but a plain write.
        os.write(2, b"stopping: what runs may finish (Ctrl-C to end at once)\n" if first else b"ended at once\n")

    view = make_view(session.err, quiet=as_json)
    with stopped_by_signals(serving, on_stop):
        events = serving.events()
        with view:
            ready = _wait_until_ready(events, view)
        if ready is not None:
            _show_ready(session, ready, as_json=as_json)
        for event in events:
            if event["kind"] == "request":
                session.write_json(event)
                continue
            view.say(str(event.get("text", event["kind"])))
        serving.finish()


def _parse_size(text: str, option: str) -> int:
    from tenon.units import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def _wait_until_ready(events: Iterator[Event], view: View) -> Event | None:
    """The event that says where the server listens; None when it ended before."""
    for event in events:
        if event["kind"] == "ready":
            return event
        view.take(event)
    return None


def _show_ready(session: Session, event: Event, *, as_json: bool) -> None:
    if as_json:
        session.write_json(event)
        return
    url, name = event["url"], event["name"]
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "hello"}]}, ensure_ascii=False)
    replicas = f"{event['replicas']} replicas, " if event.get("replicas", 1) > 1 else ""
    session.out.print(
        f"{name} at {url}: {replicas}{event['rows']} sequences of {event['context_tokens']:,} tokens, {event['slots']} "
        "adapters at a time",
        markup=False,
        soft_wrap=True,
    )
    if event["manage"] is not None:
        session.out.print(f"management at {event['manage']}, with a key of its own: tenon keys create NAME --manage")
    command = f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
    session.out.print(command, markup=False, soft_wrap=True)
