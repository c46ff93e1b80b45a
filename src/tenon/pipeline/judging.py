"""Judging: subjects of a request, a slot while it is trained, and a finished slot against its base.

This module does not know how figures are computed (evaluate) or shown.
"""

from __future__ import annotations

from tenon.adapters.asking import require_template
from tenon.data.dataset import open_dataset
from tenon.data.store import RowStore
from tenon.evaluate.run import evaluate, evaluate_many
from tenon.evaluate.values import EvaluationOptions, OnProgress, SubjectSlot
from tenon.pipeline.base import find_base
from tenon.pipeline.engine import Workbench, load_workbench
from tenon.pipeline.slot_data import Emit, SlotData, progress_events
from tenon.pipeline.subjects import Subjects
from tenon.plan.requests import EvaluateRequest
from tenon.plan.values import Plan
from tenon.runs.folder import RunFolder
from tenon.runs.results import Metric, Result
from tenon.settings import Settings
from tenon.train.slot import SlotTraining

BASE_LABEL = "base"


def judge(request: EvaluateRequest, emit: Emit, settings: Settings) -> None:
    """Judge the subjects of a request on the same rows; a `result` event each, in order."""
    engine = request.engine
    emit("phase", name="base", detail=engine.base.spec)
    folder = find_base(engine.base, settings)
    on_progress = progress_events(emit)
    with open_dataset(request.data, base_folder=folder, settings=settings, on_progress=on_progress) as dataset:
        bench = load_workbench(folder, engine.base, engine.machine, engine.precision, frozen=engine.frozen)
        subjects = Subjects(bench, dataset.renderer)
        for subject in request.subjects:
            # All are judged on the same tokens.
            require_template(subject.label, subjects.renderer(subject).template_hash, dataset.renderer)
        judges = [SubjectSlot(s.label, subjects.slot(s), s.adapter_hash) for s in request.subjects]
        emit("phase", name="evaluate", detail=", ".join(one.label for one in judges))
        results = evaluate_many(
            bench.decoder,
            bench.bank,
            judges,
            dataset.validation if request.side == "validation" else dataset.train,
            dataset.renderer,
            base_hash=engine.base.base_hash,
            options=EvaluationOptions(request.metrics, request.rows, request.max_new_tokens),
            on_progress=_evaluation_progress(emit),
        )
    for result in results:
        emit("result", result=result.model_dump(mode="json"))
    emit("finished")


def validate_slot(
    bench: Workbench, training: SlotTraining, rows: RowStore, data: SlotData, base_hash: str
) -> dict[str, Metric]:
    """The figures of a slot as it stands on its validation rows: the loss, and the metric that the plan names."""
    plan = training.plan.validation
    names = tuple(dict.fromkeys(("loss", plan.metric)))
    options = EvaluationOptions(names, plan.rows, plan.max_new_tokens, data.dataset.labels, intervals=False)
    result = evaluate(
        bench.decoder,
        bench.bank,
        SubjectSlot(training.plan.name, training.number),
        rows,
        data.dataset.renderer,
        base_hash=base_hash,
        options=options,
    )
    return {metric.name: metric for metric in result.metrics}


def judge_against_base(
    run: RunFolder, plan: Plan, training: SlotTraining, data: SlotData, bench: Workbench, emit: Emit
) -> tuple[Metric, ...]:
    """Judge a finished slot and its base on the evaluation rows, in the same passes; returns the slot's figures."""
    assert data.evaluation is not None
    slot = training.plan
    wanted = slot.evaluation
    base, adapter = evaluate_many(
        bench.decoder,
        bench.bank,
        [SubjectSlot(BASE_LABEL), SubjectSlot(slot.name, training.number)],
        data.evaluation,
        data.dataset.renderer,
        base_hash=plan.base.base_hash,
        options=EvaluationOptions(wanted.metrics, wanted.rows, wanted.max_new_tokens, data.dataset.labels),
        on_progress=_evaluation_progress(emit),
    )
    for kind, result in (("base", base), ("adapter", adapter)):
        run.write_result(f"{slot.name}-{kind}", result)
        emit("evaluated", slot=slot.name, subject=result.subject, **_figures(result))
    return adapter.metrics


def _figures(result: Result) -> dict[str, float]:
    return {metric.name: metric.value for metric in result.metrics}


def _evaluation_progress(emit: Emit) -> OnProgress:
    tell = progress_events(emit)
    return lambda done, total: tell("answers judged", done, total)
