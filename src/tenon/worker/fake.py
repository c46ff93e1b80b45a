"""A worker that does no arithmetic: the seam on which commands and live views are tried out without torch.

`TENON_WORKER=tenon.worker.fake` puts it in the place of the real one. It keeps to the same protocol, run folder and
events. What it does follows from the name of the run's first slot: one that begins with `fails` ends with a TrainError,
`crashes` with an exception that nobody expects, `loses` ends as when a lost GPU keeps it hanging, `slow` takes its
time. Its answers echo the last message.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

from tenon.errors import StopRequestedError, TrainError
from tenon.plan.requests import (
    ChatRequest,
    ChatStart,
    ChatTurn,
    CheckRequest,
    EngineRequest,
    EvaluateRequest,
    GenerateRequest,
    InspectRequest,
    ServeRequest,
    Subject,
)
from tenon.plan.values import Plan, SlotPlan
from tenon.runs.folder import RunFolder
from tenon.runs.machine import MachineRecord
from tenon.runs.nvml import gpu_lost
from tenon.runs.results import Example, Metric, Result
from tenon.runs.telemetry import end_as_failed
from tenon.serve.jobs import Limits
from tenon.serve.pool.engine_process import EngineProcess
from tenon.serve.pool.fake_engine import FakeEngine
from tenon.settings import Settings
from tenon.worker.loop import Emit, work

STEP_SECONDS = 0.01
SLOW_STEP_SECONDS = 0.2
_ROWS = 40
_MACHINE = MachineRecord(python="3.12.0", system="Fake", cores=2, packages={"torch": "2.13.0"}, no_gpu="no driver")
_CHECK = {"device": "cpu", "error": None, "bound": 1e-5, "text": "", "instead": "plain", "seconds": 0.1}
_CHECKS = {
    "sum (cpu)": {**_CHECK, "name": "sum", "state": "works", "error": 1e-7},
    "product (cpu)": {**_CHECK, "name": "product", "state": "fails", "text": "RuntimeError: no product"},
    "sum (cuda)": {**_CHECK, "name": "sum", "device": "cuda", "state": "absent"},
}


class FakePipeline:
    """Stands in for `tenon.pipeline`."""

    def train(self, run_folder: Path, settings: Settings, /) -> None:
        """Pretend to train the plan of a run folder; a stop is saved and can be resumed. Only the first rank does."""
        if settings.rank:
            return
        run = RunFolder.open(run_folder)
        plan = Plan.from_json(run.plan_json())
        with run.lock():
            newest = run.checkpoints.newest()
            first = newest.step if newest else 0
            run.events.emit("resume", step=first) if newest else run.events.emit("start")
            _FakeTraining(run, plan).steps(first)
            for slot in plan.slots:
                _finish_slot(run, plan, slot)
            run.events.emit("finished")

    def evaluate(self, request: EvaluateRequest, emit: Emit, _settings: Settings, /) -> None:
        """One result a subject: the base answers a tenth right, an adapter nine tenths."""
        emit("phase", name="evaluate", detail=f"{len(request.subjects)} subjects")
        for subject in request.subjects:
            result = _result(request.engine.base.base_hash, subject)
            emit("result", result=result.model_dump(mode="json"))

    def generate(self, request: GenerateRequest, emit: Emit, _settings: Settings, /) -> None:
        """Echo every prompt, last one first: order is the caller's business."""
        for index in reversed(range(len(request.prompts))):
            text = _echo(request.subject, request.prompts[index].messages[-1]["content"])
            emit("completion", index=index, text=text, tokens=len(text.split()), finish="stop")

    def inspect_data(self, request: InspectRequest, emit: Emit, _settings: Settings, /) -> None:
        """A report, rows and lengths of data that were never read."""
        for slot in request.plan.slots:
            emit("report", slot=slot.name, report=_report(slot.name))
            for row in range(min(request.rows, _ROWS)):
                pieces = [[f"<user>question {row}<assistant>", False], [f"answer {row}<end>", True]]
                emit("row", slot=slot.name, source=f"fake.jsonl:{row + 1}", pieces=pieces, tokens=8, supervised=4)

    def check_kernels(self, request: CheckRequest, emit: Emit, _settings: Settings, /) -> None:
        """Three checks of no kernel: one works, one fails, one finds no GPU."""
        emit("machine", machine=_MACHINE.model_dump(mode="json"))
        for key, fields in _CHECKS.items():
            if key not in request.done:
                told = {name: fields[name] for name in ("device", "bound", "instead")}
                emit("progress", what=fields["name"], done=0, total=len(_CHECKS), key=key, **told)
                emit("check", key=key, **fields)
        emit("finished")

    def serve(self, request: ServeRequest, emit: Emit, _settings: Settings, /) -> None:
        """Listen to nobody until SIGTERM."""
        url = f"http://{request.host}:{request.port}"
        told = {"rows": request.rows, "context_tokens": request.context_tokens, "slots": request.slots}
        emit("ready", url=url, manage=None, name=request.name, **told)
        with suppress(StopRequestedError):
            while True:
                time.sleep(STEP_SECONDS)

    def engine(self, request: EngineRequest, lines: Iterator[str], emit: Emit, _settings: Settings, /) -> None:
        """Answer jobs without arithmetic: see `FakeEngine`."""
        process = EngineProcess(emit)
        limits = Limits(request.rows, request.context_tokens, request.cache_bytes, 1, request.slots)
        engine = FakeEngine(
            limits=limits,
            deliver=process.deliver,
            on_start=process.on_start,
            on_turn=process.on_turn,
            pass_seconds=STEP_SECONDS,
        )
        emit("ready")
        process.run(engine, lines)

    def chat(self, requests: Iterator[ChatRequest], emit: Emit, _settings: Settings, /) -> None:
        """Echo the last message, word by word."""
        for request in requests:
            if isinstance(request, ChatStart):
                emit("ready", adapters=[subject.label for subject in request.subjects])
            else:
                _chat_turn(request, emit)


class _FakeTraining:
    """Steps with a falling loss; SIGTERM and Ctrl-C are obeyed between two of them."""

    def __init__(self, run: RunFolder, plan: Plan) -> None:
        self._run = run
        self._plan = plan
        self._total = max(1, plan.estimate.steps)
        self._stopped = False

    def steps(self, first: int) -> None:
        """All steps after `first`. Raises StopRequestedError when it was asked to stop."""
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        name = self._plan.slots[0].name
        try:
            self._run.events.emit("phase", name="train", detail=f"{self._total} steps")
            for step in range(first + 1, self._total + 1):
                time.sleep(SLOW_STEP_SECONDS if name.startswith("slow") else STEP_SECONDS)
                self._step(step)
                if self._stopped:
                    self._save_and_stop(step)
                if step == 3 and name.startswith("fails"):
                    self._fail(step)
                if step == 3 and name.startswith("crashes"):
                    raise RuntimeError("a fault of the fake worker, asked for by the slot's name")
                if step == 3 and name.startswith("loses"):
                    end_as_failed(self._run.events, gpu_lost("GPU is lost"))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._stopped = True

    def _step(self, step: int) -> None:
        for slot in self._plan.slots:
            self._run.events.emit(
                "step",
                slot=slot.name,
                step=step,
                loss=0.1 + 3.0 * 0.97**step,
                lr=slot.optimizer.lr,
                tokens=step * 1000,
                tokens_per_second=1234.5,
                row_tokens=1000,
                grad_norm=1.0,
                memory_bytes=1_200_000_000,
                progress=step / self._total,
                seconds_left=(self._total - step) * STEP_SECONDS,
            )

    def _save_and_stop(self, step: int) -> None:
        self._run.checkpoints.write(step, _write_state)
        self._run.events.emit("checkpoint", step=step)
        self._run.events.emit("stopped", step=step)
        raise StopRequestedError(
            "run-stopped", f"stopped and saved after step {step}", hint=f"tenon resume {self._run.path}"
        )

    def _fail(self, step: int) -> None:
        error = TrainError(
            "train-not-finite", f"step {step}: the loss is not finite", got="nan", hint="lower optimizer.lr"
        )
        self._run.events.emit("failed", code=error.code, text=error.what)
        raise error


def _report(slot: str) -> dict[str, object]:
    """A report in the shape of `tenon.data.report.DataReport`; a slot that `fails` has a problem."""
    problem = {"code": "data-no-supervised", "what": "no row has a supervised token", "got": "", "hint": "add answers"}
    lengths = {"edges": [1, 8, 16], "counts": [10, 30], "mean_tokens": 8.0, "median_tokens": 8, "longest": []}
    drop = {"code": "data-row-too-long", "reason": "the row is longer than data.max_tokens", "rows": 2, "places": []}
    return {
        "sources": [],
        "train_rows": _ROWS,
        "validation_rows": 0,
        "repeated": 1,
        "shortened": 0,
        "drops": [drop],
        "tokenised": _ROWS,
        "train_tokens": 8 * _ROWS,
        "train_supervised_tokens": 4 * _ROWS,
        "lengths": lengths,
        "labels": [],
        "problems": [problem] if slot.startswith("fails") else [],
        "warnings": [],
    }


def _write_state(aside: Path) -> None:
    (aside / "state").write_text("nothing to go on from but the step")


def _finish_slot(run: RunFolder, plan: Plan, slot: SlotPlan) -> None:
    run.events.emit("phase", name="evaluate", detail=slot.name)
    for subject in (Subject(label="base"), Subject(label=slot.name, folder="adapter")):
        result = _result(plan.base.base_hash, subject)
        run.write_result(f"{slot.name}-{'base' if subject.folder is None else 'adapter'}", result)
        run.events.emit("evaluated", slot=slot.name, subject=subject.label, **{m.name: m.value for m in result.metrics})
    if slot.register_as is not None:
        run.events.emit("registered", slot=slot.name, name=slot.register_as, version=1)


def _result(base_hash: str, subject: Subject) -> Result:
    """Every tenth row right for the base, all but every tenth for an adapter."""
    examples = tuple(_example(row, right=(row % 10 == 0) == (subject.folder is None)) for row in range(_ROWS))
    exact = sum(example.scores["exact"] for example in examples) / _ROWS
    nll = sum(example.scores["nll"] for example in examples) / sum(example.tokens for example in examples)
    return Result(
        subject=subject.label,
        base_hash=base_hash,
        adapter_hash=subject.adapter_hash,
        data_hash="0" * 64,
        template_hash="0" * 64,
        task="text",
        metrics=(
            Metric(name="loss", value=nll, low=nll, high=nll, unit="nats/token", higher_is_better=False),
            Metric(name="exact", value=exact, low=max(0.0, exact - 0.1), high=min(1.0, exact + 0.1), unit="share"),
        ),
        examples=examples,
    )


def _example(row: int, *, right: bool) -> Example:
    return Example(
        row=row,
        source=f"fake.jsonl:{row + 1}",
        prompt=f"question {row}",
        expected=f"answer {row}",
        got=f"answer {row}" if right else "no idea",
        tokens=4,
        scores={"exact": float(right), "nll": 0.4 if right else 8.0},
    )


def _chat_turn(turn: ChatTurn, emit: Emit) -> None:
    words = _echo(turn.subject, turn.messages[-1]["content"]).split(" ")
    said: list[str] = []
    finish = "stop"
    try:
        for index, word in enumerate(words):
            piece = word if index == 0 else f" {word}"
            said.append(piece)
            emit("token", text=piece)
            time.sleep(STEP_SECONDS)
    except StopRequestedError:
        finish = "interrupted"
    emit("answer", text="".join(said), tokens=len(said), finish=finish, seconds=len(said) * STEP_SECONDS)


def _echo(subject: Subject, text: str) -> str:
    return f"{subject.label} heard: {text}"


if __name__ == "__main__":
    sys.exit(work(sys.argv[1:], FakePipeline))
