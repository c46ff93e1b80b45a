"""A server from its start to its end: HTTP in a thread of its own, the engine in the one that calls, and the way out.

SIGTERM: nothing new is taken, what runs may finish for `drain_seconds`, then everything ends. However often it comes:
supervisors send it to a whole group, and some of them twice. This module does not know routes, and reads no request.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType

import uvicorn
from fastapi import FastAPI

from tenon.data.grammars import Grammars
from tenon.data.tokenizer import ChatTokenizer
from tenon.errors import UsageError
from tenon.registry.store import Registry
from tenon.serve.api.app import Face, make_app
from tenon.serve.api.desk import Desk
from tenon.serve.api.forms import Forms
from tenon.serve.front.access import Access
from tenon.serve.front.gate import Gate
from tenon.serve.front.life import Life
from tenon.serve.front.names import Names
from tenon.serve.http.connections import Bounds, connection_class
from tenon.serve.jobs import Deliver, Engines, Event, Mailbox
from tenon.serve.manage.app import Manage, make_manage_app
from tenon.serve.watching.metrics import Metrics
from tenon.serve.watching.records import Observer
from tenon.tenants.keys import KeyStore
from tenon.tenants.usage import UsageReader

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.02
_SEND_BYTES = 1 << 17
# Connections that are still being written to when everything has ended get so long.
_LAST_WRITES_SECONDS = 5

MakeEngines = Callable[[Deliver, Grammars], Engines]
"""Whoever makes the sequences, given where the events go."""


@dataclass(frozen=True, slots=True)
class Options:
    """queue: sequences that may wait besides those that run. fingerprint: of the base. vocabulary: its tokens.
    hidden: numbers of its hidden states. observers: told of every request, besides the metrics; keep_prompts: one of
    them wants prompts.
    """

    queue: int
    most_body_bytes: int
    drain_seconds: float
    fingerprint: str
    vocabulary: int
    hidden: int
    version: str
    cors: tuple[str, ...] = ()
    bounds: Bounds = field(default_factory=Bounds)
    observers: tuple[Observer, ...] = ()
    keep_prompts: bool = False


@dataclass(frozen=True, slots=True)
class Managing:
    """The management API: where it listens, and what it manages besides the server."""

    listening: socket.socket
    registry: Registry
    store: KeyStore
    usage: UsageReader


class Outlet:
    """Carries events from the engine's thread to the event loop of the HTTP server, all of a pass at once."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None

    def __call__(self, letters: list[tuple[Mailbox, Event]], /) -> None:
        if self.loop is not None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self.loop.call_soon_threadsafe(_put_all, letters)


def _put_all(letters: list[tuple[Mailbox, Event]]) -> None:
    for mailbox, event in letters:
        mailbox.put(event)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises UsageError usage-address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=2048)
        # Connections have both from here. The kernel would else take megabytes for each client that does not read, and
        # keep a token back until the client has acknowledged what came before it, which takes that up to 40 ms.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except (OSError, OverflowError) as error:
        raise UsageError(
            "usage-address",
            f"cannot listen on {host}, port {port}: {error}",
            hint="choose another port (--port 0 takes a free one), or an address of this machine (--host)",
        ) from error


def address(listening: socket.socket) -> str:
    """Where clients on this machine reach it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Front:
    """A server but for its listening: the engine, the way in, and the application over both, for any ASGI server.

    `outlet.loop` has to be the event loop that runs `app`, and somebody has to run `engine`.
    """

    def __init__(
        self,
        make_engines: MakeEngines,
        tokenizer: ChatTokenizer,
        names: Names,
        *,
        options: Options,
        access: Access | None = None,
        say: Callable[[str], None] = log.warning,
    ) -> None:
        """See `Server`."""
        self.outlet = Outlet()
        grammars = Grammars(tokenizer, vocabulary=options.vocabulary)
        self.engine = make_engines(self.outlet, grammars)
        self.gate = Gate(self.engine, tokenizer, Metrics(self.engine), most=self.engine.limits.rows + options.queue)
        self.life = Life(self.gate, names, say)
        self.gate.on_end = self.life.ended
        forms = Forms(grammars)
        self.desk = Desk(
            self.gate, names, options.fingerprint, options.vocabulary, options.hidden, forms, access, self.life
        )
        face = Face(
            version=options.version,
            most_body_bytes=options.most_body_bytes,
            body_seconds=options.bounds.body_seconds,
            cors=options.cors,
            observers=options.observers,
            keep_prompts=options.keep_prompts,
        )
        self.app = make_app(self.desk, face)


class Server:
    """One server. `start` HTTP, then `work` in the thread that is to own the engine; `drain` lets `work` return."""

    def __init__(
        self,
        make_engines: MakeEngines,
        tokenizer: ChatTokenizer,
        names: Names,
        *,
        listening: socket.socket,
        options: Options,
        access: Access | None = None,
        say: Callable[[str], None] = log.warning,
        managing: Managing | None = None,
    ) -> None:
        """access: who may ask; None where nobody is asked for a key. say: told in a sentence what became of an alias.
        Any thread may call it. managing: None where nothing is managed.
        """
        front = Front(make_engines, tokenizer, names, options=options, access=access, say=say)
        self.engine, self.gate, self.life = front.engine, front.gate, front.life
        served = [(front.app, listening)]
        if managing is not None:
            manage = Manage(front.desk, managing.registry, managing.store, managing.usage, options.version, self.drain)
            served.append((make_manage_app(manage), managing.listening))
        self._http = HttpThread(served, self.gate, front.outlet, options)

    def start(self) -> None:
        """Begin to take requests; they are answered once `work` runs."""
        self._http.start()

    def work(self) -> None:
        """Answer until the HTTP server has ended. Raises what the engine raises, after telling every client."""
        try:
            self.engine.run()
        finally:
            self._http.finish()

    def drain(self) -> None:
        """Take nothing new, let what runs finish, then end. Safe in a signal handler."""
        self._http.drain()

    def end(self) -> None:
        """End at once: what runs is told so."""
        self._http.end()


@contextmanager
def stopped_by_signals(server: Server) -> Iterator[None]:
    """SIGTERM and Ctrl-C drain the server. Main thread only."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        server.drain()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class HttpThread:
    """The HTTP servers in their thread. When they end, the engine is stopped."""

    def __init__(
        self, served: Sequence[tuple[FastAPI, socket.socket]], gate: Gate, outlet: Outlet, options: Options
    ) -> None:
        """served: applications, each with the socket that it listens on."""
        self._gate, self._outlet, self._drain_seconds = gate, outlet, options.drain_seconds
        self._servers = [(uvicorn.Server(_config(app, options.bounds)), listening) for app, listening in served]
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="http")
        self._up = threading.Event()
        self._draining: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start it, and wait until its event loop runs."""
        self._ended = self._thread.submit(self._run)
        self._up.wait()

    def drain(self) -> None:
        """See `Server.drain`."""
        self._call(self._begin_drain)

    def end(self) -> None:
        """See `Server.end`."""
        self._call(self._end)

    def finish(self) -> None:
        """End at once, if it has not ended yet, and wait for that. Raises what the server raised."""
        self.end()
        self._thread.shutdown()
        self._ended.result()

    def _call(self, work: Callable[[], None]) -> None:
        if self._outlet.loop is not None:
            with suppress(RuntimeError):  # the loop is closed: it has ended
                self._outlet.loop.call_soon_threadsafe(work)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        finally:
            self._up.set()
            self._gate.engine.stop()

    async def _serve(self) -> None:
        self._outlet.loop = asyncio.get_running_loop()
        self._up.set()
        await asyncio.gather(*(server.serve(sockets=[listening]) for server, listening in self._servers))

    def _begin_drain(self) -> None:
        if not self._gate.draining:
            self._gate.draining = True
            self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        deadline = time.monotonic() + self._drain_seconds
        while self._gate.open and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
        self._end()

    def _end(self) -> None:
        self._gate.draining = True
        self._gate.abort()
        for server, _ in self._servers:
            server.should_exit = True


def _config(app: FastAPI, bounds: Bounds) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=connection_class(bounds),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",  # what clients send wrong is no news
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_LAST_WRITES_SECONDS,
    )
