"""Talking to subjects: one conversation, streamed; or many prompts in batches.

This module does not know terminals or files.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from tenon.data.render import Renderer
from tenon.errors import DataError, StopRequestedError, UsageError
from tenon.infer.generate import generate
from tenon.infer.requests import Completion, Request, Token
from tenon.pipeline.base import find_base
from tenon.pipeline.engine import Workbench, load_workbench
from tenon.pipeline.slot_data import Emit
from tenon.pipeline.subjects import Subjects
from tenon.plan.requests import ChatRequest, ChatStart, ChatTurn, Engine, GenerateRequest, Sampling
from tenon.settings import Settings


def open_engine(engine: Engine, settings: Settings, emit: Emit, *, shelf_rank: int = 0) -> tuple[Workbench, Renderer]:
    """The resident base of a request, and its renderer. shelf_rank: see `Decoder`."""
    emit("phase", name="base", detail=engine.base.spec)
    folder = find_base(engine.base, settings)
    bench = load_workbench(
        folder, engine.base, engine.machine, engine.precision, frozen=engine.frozen, shelf_rank=shelf_rank
    )
    return bench, bench.renderer(engine.template)


def answer_prompts(request: GenerateRequest, emit: Emit, settings: Settings) -> None:
    """Answer every prompt of a request; a `completion` event each."""
    bench, shared = open_engine(request.engine, settings, emit)
    subjects = Subjects(bench, shared)
    slot, renderer = subjects.slot(request.subject), subjects.renderer(request.subject)
    stop_ids = subjects.stop_ids(request.subject)
    asked = []
    for number, prompt in enumerate(request.prompts):
        ids = renderer.prompt(prompt.messages, prompt.tools or None, source=prompt.source)
        _require_room(bench, ids, prompt.source)
        asked.append(_request(ids, slot, request.sampling, stop_ids, number))
    emit("phase", name="generate", detail=f"{len(asked)} prompts")
    for index, found in enumerate(generate(bench.decoder, bench.bank, asked)):
        emit(
            "completion",
            index=index,
            text=renderer.tokenizer.decode(found.ids),
            tokens=len(found.ids),
            finish=found.finish,
        )
    emit("finished")


def converse(requests: Iterator[ChatRequest], emit: Emit, settings: Settings) -> None:
    """Answer the turns of a conversation as they come; the base and the adapters stay loaded between them."""
    start = next(requests, None)
    if not isinstance(start, ChatStart):
        raise UsageError(
            "usage-worker-request",
            "a conversation begins with a start request",
            hint="let the tenon command start the worker, of the same version",
        )
    bench, renderer = open_engine(start.engine, settings, emit)
    subjects = Subjects(bench, renderer)
    for subject in start.subjects:
        subjects.slot(subject)
    emit("ready", adapters=[subject.label for subject in start.subjects])
    for turn in requests:
        if isinstance(turn, ChatTurn):
            _answer_turn(turn, bench, subjects, emit)


def _answer_turn(turn: ChatTurn, bench: Workbench, subjects: Subjects, emit: Emit) -> None:
    started = time.monotonic()
    renderer = subjects.renderer(turn.subject)
    ids = renderer.prompt(turn.messages)
    _require_room(bench, ids, "the conversation")
    stream = renderer.tokenizer.stream()
    said: list[str] = []
    interrupted = False

    def on_token(index: int, token: Token) -> bool:
        nonlocal interrupted
        del index
        said.append(stream.push(token.id))
        try:
            emit("token", text=said[-1])
        except StopRequestedError:
            interrupted = True
        return not interrupted

    request = _request(ids, subjects.slot(turn.subject), turn.sampling, subjects.stop_ids(turn.subject), 0)
    (found,) = generate(bench.decoder, bench.bank, [request], on_token=on_token)
    said.append(stream.finish())
    emit(
        "answer",
        text="".join(said),
        tokens=len(found.ids),
        finish=_finish(found, interrupted=interrupted),
        seconds=time.monotonic() - started,
    )


def _finish(found: Completion, *, interrupted: bool) -> str:
    if interrupted:
        return "interrupted"
    return "length" if found.finish == "context" else found.finish


def _request(ids: Sequence[int], slot: int, sampling: Sampling, stop_ids: frozenset[int], number: int) -> Request:
    return Request(
        prompt_ids=ids,
        slot=slot,
        max_new_tokens=sampling.max_new_tokens,
        stop_ids=stop_ids,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed + number,
    )


def _require_room(bench: Workbench, ids: Sequence[int], source: str) -> None:
    most = bench.decoder.facts.context_tokens
    if len(ids) >= most:
        raise DataError(
            "data-prompt-too-long",
            f"{source}: the prompt leaves no room for an answer in the base's context of {most:,} tokens",
            got=f"{len(ids):,} tokens",
            hint="shorten it, or begin a new conversation",
        )
