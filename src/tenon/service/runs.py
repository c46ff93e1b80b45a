"""Looking at one run: its plan, how far it is, how it went against its plan.

This module does not know screens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import ValidationError

from tenon.errors import RunError
from tenon.plan.values import Plan
from tenon.runs.events import Event, curve
from tenon.runs.folder import RunFolder
from tenon.runs.results import Result
from tenon.runs.status import RunStatus, status
from tenon.runs.telemetry import summarise_events


@dataclass(frozen=True, slots=True)
class Actual:
    """What a run took so far, from its events. seconds: of all its lives, the time in between not counted."""

    seconds: float
    memory_bytes: int
    tokens: int
    steps: int


@dataclass(frozen=True, slots=True)
class RunReport:
    """A run at a glance: its plan, state, curves by slot, validations by slot, figures against the plan, results.

    memory: how steps were made at last, as it was decided while running; "" where the plan's decision stood. proof: the
    newest `proof` event; None where no fast path was held against plain torch. gpus: a summary of each GPU's telemetry,
    with the fields of a `gpu` event.
    """

    run: RunFolder
    plan: Plan
    status: RunStatus
    losses: dict[str, list[float]]
    validations: dict[str, list[Event]]
    actual: Actual
    registered: tuple[str, ...]
    warnings: tuple[str, ...]
    memory: str
    proof: Event | None
    gpus: tuple[Event, ...]


def read_plan(run: RunFolder) -> Plan:
    """The plan of a run. Raises RunError run-damaged."""
    try:
        return Plan.from_json(run.plan_json())
    except ValidationError as error:
        raise RunError(
            "run-damaged",
            f"{run.path / 'plan.json'}: this is no plan of this version",
            got=str(error.errors()[0]["msg"]),
            hint="restore the file, or start the run again with `tenon train RECIPE`",
        ) from error


def describe_run(run: RunFolder) -> RunReport:
    """Everything that the files of a run tell. Raises RunError run-damaged."""
    plan = read_plan(run)
    path = run.path / "events.jsonl"
    events = list(run.events.read())
    return RunReport(
        run=run,
        plan=plan,
        status=status(run),
        losses={slot.name: _losses(curve(path, slot.name)) for slot in plan.slots},
        validations={slot.name: curve(path, slot.name, kind="validation") for slot in plan.slots},
        actual=measure_actual(events),
        registered=tuple(f"{event['name']}@{event['version']}" for event in events if event["kind"] == "registered"),
        warnings=tuple(str(event.get("text")) for event in events if event["kind"] == "warning"),
        memory=next((str(event.get("text")) for event in reversed(events) if event["kind"] == "memory"), ""),
        proof=next((event for event in reversed(events) if event["kind"] == "proof"), None),
        gpus=tuple(summarise_events(events)),
    )


def read_results(run: RunFolder) -> list[Result]:
    """Every evaluation of a run, the base's first. Raises RunError run-damaged."""
    results = [run.read_result(name) for name in run.result_names()]
    return sorted(results, key=lambda result: (result.subject != "base", result.subject))


def read_pairs(run: RunFolder, plan: Plan) -> list[tuple[Result, Result]]:
    """For each slot that was judged after training: the base's result and the adapter's, on the same rows."""
    names = set(run.result_names())
    pairs = [(f"{slot.name}-base", f"{slot.name}-adapter") for slot in plan.slots]
    return [(run.read_result(base), run.read_result(own)) for base, own in pairs if {base, own} <= names]


def measure_actual(events: Iterable[Event]) -> Actual:
    """Time, memory, tokens and steps of a run from its events; work that was lost to a kill counts as time only."""
    seconds, memory_bytes = 0.0, 0
    previous: float | None = None
    tokens: dict[tuple[object, object], int] = {}
    for event in events:
        now = float(event["t"] or 0.0)
        if previous is not None and event["kind"] not in ("start", "resume"):
            seconds += max(0.0, now - previous)
        previous = now
        if event["kind"] == "step":
            memory_bytes = max(memory_bytes, int(event.get("memory_bytes") or 0))
            tokens[event.get("slot"), event.get("step")] = int(event.get("tokens") or 0)
    steps = max((int(step) for _, step in tokens if isinstance(step, int)), default=0)
    return Actual(seconds=seconds, memory_bytes=memory_bytes, tokens=sum(tokens.values()), steps=steps)


def _losses(events: Iterable[Event]) -> list[float]:
    return [float(loss) for event in events if isinstance(loss := event.get("loss"), int | float)]
