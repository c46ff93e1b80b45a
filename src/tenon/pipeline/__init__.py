"""What a worker can do, one function a kind of request. The story of a run is in `pipeline.training`.

Nothing heavy is imported before it is asked for: a look at the data needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from tenon.plan.requests import (
    ChatRequest,
    CheckRequest,
    EngineRequest,
    EvaluateRequest,
    GenerateRequest,
    InspectRequest,
    ServeRequest,
)
from tenon.settings import Settings


class Emit(Protocol):
    """Writes one event."""

    def __call__(self, kind: str, /, **fields: Any) -> object: ...


def train(run_folder: Path, settings: Settings, /) -> None:
    """Do, or go on with, the run of a folder: see `pipeline.training.train`."""
    from tenon.pipeline.training import train as work

    work(run_folder, settings)


def evaluate(request: EvaluateRequest, emit: Emit, settings: Settings, /) -> None:
    """Judge subjects on the same rows: see `pipeline.judging.judge`."""
    from tenon.pipeline.judging import judge

    judge(request, emit, settings)


def generate(request: GenerateRequest, emit: Emit, settings: Settings, /) -> None:
    """Answer many prompts: see `pipeline.talking.answer_prompts`."""
    from tenon.pipeline.talking import answer_prompts

    answer_prompts(request, emit, settings)


def inspect_data(request: InspectRequest, emit: Emit, settings: Settings, /) -> None:
    """Look at the data of a plan: see `pipeline.inspection.inspect_slots`."""
    from tenon.pipeline.inspection import inspect_slots

    inspect_slots(request, emit, settings)


def check_kernels(request: CheckRequest, emit: Emit, settings: Settings, /) -> None:
    """Try out what works on this machine: see `pipeline.doctor.examine`."""
    from tenon.pipeline.doctor import examine

    examine(request, emit, settings)


def serve(request: ServeRequest, emit: Emit, settings: Settings, /) -> None:
    """Answer requests over HTTP: see `pipeline.serving.serve`."""
    from tenon.pipeline.serving import serve as work

    work(request, emit, settings)


def engine(request: EngineRequest, lines: Iterator[str], emit: Emit, settings: Settings, /) -> None:
    """Make sequences for a server's front: see `pipeline.own_engine.run_engine`."""
    from tenon.pipeline.own_engine import run_engine

    run_engine(request, lines, emit, settings)


def chat(requests: Iterator[ChatRequest], emit: Emit, settings: Settings, /) -> None:
    """Answer the turns of a conversation: see `pipeline.talking.converse`."""
    from tenon.pipeline.talking import converse

    converse(requests, emit, settings)
