"""Judging subjects on rows: who is meant, on which rows, what came of it, and what differs.

This module does not know how anything is measured, nor screens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from tenon.errors import RunError, UsageError
from tenon.plan.requests import EvaluateRequest
from tenon.plan.values import SourcePlan
from tenon.processes import Event, ask_worker
from tenon.runs.atomic import write_file_atomic
from tenon.runs.results import Comparison, Result
from tenon.service.environment import require_training
from tenon.service.subjects import Opened, Rows, open_subjects, rows_of
from tenon.settings import Settings


@dataclass(frozen=True, slots=True)
class Question:
    """What `tenon eval` and `tenon compare` ask. base: overrides the subjects' own. data empty: the run's own rows."""

    subjects: tuple[str, ...]
    data: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    rows: int = 0
    base: str | None = None
    max_new_tokens: int = 256


def judge(question: Question, settings: Settings, on_event: Callable[[Event], None]) -> tuple[Result, ...]:
    """One result a subject, in order. on_event: told what happens meanwhile.

    Raises UsageError usage-no-data; those of `open_subjects`; what the worker raises.
    """
    require_training()
    opened = open_subjects(question.subjects, question.base, settings)
    rows = _rows_to_judge(question, opened)
    request = EvaluateRequest(
        engine=opened[0].engine,
        subjects=tuple(each.subject for each in opened),
        data=rows.data,
        side=rows.side,
        metrics=question.metrics,
        rows=question.rows,
        max_new_tokens=question.max_new_tokens,
    )
    results: list[Result] = []
    for event in ask_worker("evaluate", request, settings=settings):
        if event["kind"] == "result":
            results.append(Result.model_validate(event["result"]))
        else:
            on_event(event)
    return tuple(results)


def compare_results(a: Result, b: Result) -> Comparison:
    """B against A, row by row. Raises what `evaluate.compare` raises when the rows are not the same."""
    from tenon.evaluate.compare import compare

    return compare(a, b)


def read_results_file(path: Path) -> Result:
    """A result that `--out FILE.json` or a run wrote. Raises RunError run-no-result, run-damaged."""
    try:
        tree = json.loads(path.read_bytes())
        return Result.model_validate(tree[-1] if isinstance(tree, list) else tree)
    except OSError as error:
        raise RunError(
            "run-no-result", f"{path}: the results cannot be read", got=str(error.strerror), hint="check the path"
        ) from error
    except (ValueError, IndexError, ValidationError) as error:
        raise RunError(
            "run-damaged", f"{path}: the file is no result of this version", hint="make it again: tenon eval --out FILE"
        ) from error


def write_records(path: Path, results: Sequence[Result]) -> None:
    """Per-example records: .jsonl has one example of one subject a line, .json the whole results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        text = json.dumps([result.model_dump(mode="json") for result in results], ensure_ascii=False)
    else:
        text = "\n".join(
            json.dumps({"subject": result.subject, **example.model_dump(mode="json")}, ensure_ascii=False)
            for result in results
            for example in result.examples
        )
    write_file_atomic(path, (text + "\n").encode())


def _rows_to_judge(question: Question, opened: Sequence[Opened]) -> Rows:
    """The given rows, or those that a run was evaluated on; rendered as the last subject's training rendered."""
    if question.data:
        # `base` comes first and has no opinion on how rows are rendered.
        sources = tuple(SourcePlan(path=_absolute(path)) for path in question.data)
        return rows_of(opened[-1].data, sources)
    rows = next((each.rows for each in reversed(opened) if each.rows is not None), None)
    if rows is None:
        raise UsageError(
            "usage-no-data",
            f"there are no rows to judge {opened[-1].subject.label} on",
            hint="name some: --data FILE",
        )
    return rows


def _absolute(path: str) -> str:
    found = Path(path).expanduser()
    return str(found.absolute()) if found.exists() else path
