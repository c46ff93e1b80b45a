"""A server as a user has it: planned from a base or a recipe, started in a worker process, stopped in good order.

This module does not know HTTP, how answers are made, nor screens.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from tenon.errors import StopRequestedError
from tenon.plan.precision import resident_format
from tenon.plan.requests import Engine, ServeRequest
from tenon.plan.values import BasePlan
from tenon.processes import Event, start_worker, worker_log
from tenon.recipe.load import load_recipe
from tenon.recipe.schema import BaseChoice
from tenon.service.environment import require_serving
from tenon.service.subjects import open_subject
from tenon.settings import Settings

_RECIPES = (".yaml", ".yml")


def open_base(spec: str | None, settings: Settings, *, base_precision: BaseChoice | None = None) -> Engine:
    """What to serve: a base, the base of a recipe (with its template, and in its precision), or the embedded base.

    base_precision: what the base is kept in; None as the recipe says, or as there is room.
    Raises RecipeError, BaseModelError, PlanError plan-precision; those of `require_serving`.
    """
    require_serving()
    template = None
    if spec is not None and Path(spec).suffix in _RECIPES:
        loaded = load_recipe(Path(spec))
        spec = loaded.base_spec
        base_precision = base_precision or loaded.recipe.precision.base
        written = loaded.recipe.data.template
        template = None if written is None else loaded.resolve(written)
    engine = open_subject(None, spec, settings).engine
    if base_precision is not None:
        frozen = resident_format(engine.facts, engine.machine, engine.precision, base_precision)
        engine = engine.model_copy(update={"frozen": frozen})
    return engine if template is None else engine.model_copy(update={"template": template})


def public_name(base: BasePlan) -> str:
    """What clients call a base: its name, or the last part of its path without `.gguf`."""
    place = Path(base.spec).expanduser()
    return place.resolve().name.removesuffix(".gguf") if place.exists() else base.spec


class Serving:
    """A server in a worker process. Listen to its events, then `finish`."""

    def __init__(self, request: ServeRequest, settings: Settings) -> None:
        """Starts the worker; its `ready` event says where it listens."""
        self.worker = start_worker("serve", None, settings=settings, log=worker_log("serve", settings))
        self.worker.send(request)

    def events(self) -> Iterator[Event]:
        """Its events as they come, until it has ended."""
        return self.worker.events()

    def replace_replicas(self) -> None:
        """Have every replica replaced by a new one, one after the other."""
        with suppress(ProcessLookupError):
            os.kill(self.worker.pid, signal.SIGUSR1)

    def finish(self) -> None:
        """Wait for its end. Being stopped is its good end. Raises what the worker raised."""
        with suppress(StopRequestedError):
            self.worker.finish()
        self.worker.log.unlink(missing_ok=True)


@contextmanager
def stopped_by_signals(serving: Serving, on_stop: Callable[[bool], None]) -> Iterator[None]:
    """SIGTERM, SIGHUP and Ctrl-C let the server finish what runs; only a second Ctrl-C ends it at once.

    A second SIGTERM changes nothing: supervisors send it to a whole group, and some of them twice. on_stop: told of the
    first stop (True), and of the end at once; called in the signal handler. SIGUSR1 replaces the replicas. Main thread
    only.
    """

    def handler(number: int, _frame: FrameType | None) -> None:
        first = not serving.worker.stopping
        if first or number == signal.SIGINT:
            serving.worker.stop()
            on_stop(first)

    def roll(_number: int, _frame: FrameType | None) -> None:
        serving.replace_replicas()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, roll)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
