"""`tenon eval` and `tenon compare`: how good, against what, and whether the difference is more than chance."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tenon.cli.plans import AsJson
from tenon.cli.session import session_of

DataPaths = Annotated[
    list[str] | None,
    typer.Option("--data", help="Rows to judge on, any format that a recipe takes; by default the run's own."),
]
MetricNames = Annotated[
    list[str] | None, typer.Option("--metric", help="May be given again; by default chosen by the kind of rows.")
]
RowLimit = Annotated[int, typer.Option("--rows", min=0, help="At most so many rows; 0 is all.")]
OutFile = Annotated[
    Path | None, typer.Option("--out", help="Write per-example records: .jsonl, or the whole results as .json.")
]
Longest = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest generated answer, in tokens.")]
Base = Annotated[str | None, typer.Option("--base", help="Base; by default the adapter's own, or the embedded one.")]


def evaluate(
    ctx: typer.Context,
    subject: Annotated[str, typer.Argument(metavar="SUBJECT", help="A run, an adapter, a PEFT folder, or `base`.")],
    *,
    data: DataPaths = None,
    metric: MetricNames = None,
    rows: RowLimit = 0,
    base: Base = None,
    alone: Annotated[bool, typer.Option("--alone", help="Do not judge the bare base beside it.")] = False,
    max_new_tokens: Longest = 256,
    out: OutFile = None,
    as_json: AsJson = False,
) -> None:
    """Judge an adapter against its base on the same rows: loss, and what fits the rows, with 95% intervals."""
    from tenon.service.judging import Question

    names = ["base", subject] if subject != "base" and not alone else [subject]
    question = Question(
        tuple(names), tuple(data or ()), tuple(metric or ()), rows=rows, base=base, max_new_tokens=max_new_tokens
    )
    _judge(ctx, question, out=out, as_json=as_json)


def compare(
    ctx: typer.Context,
    a: Annotated[str, typer.Argument(metavar="A", help="A run, an adapter, `base`, or a results file (.json).")],
    b: Annotated[str, typer.Argument(metavar="B", help="The same; what is said is B against A.")],
    *,
    data: DataPaths = None,
    metric: MetricNames = None,
    rows: RowLimit = 0,
    base: Base = None,
    max_new_tokens: Longest = 256,
    out: OutFile = None,
    as_json: AsJson = False,
) -> None:
    """Hold two subjects, or two results files, against each other on the same rows, and say what differs."""
    from tenon.cli.result_view import show_comparison
    from tenon.service.judging import Question, compare_results, read_results_file

    session = session_of(ctx)
    if a.endswith(".json") and b.endswith(".json"):
        comparison = compare_results(read_results_file(Path(a)), read_results_file(Path(b)))
        if as_json:
            session.write_json(comparison.model_dump(mode="json"))
        else:
            show_comparison(session.out, comparison)
        return
    question = Question(
        (a, b), tuple(data or ()), tuple(metric or ()), rows=rows, base=base, max_new_tokens=max_new_tokens
    )
    _judge(ctx, question, out=out, as_json=as_json)


def _judge(ctx: typer.Context, question: object, *, out: Path | None, as_json: bool) -> None:
    from tenon.cli.live import make_view
    from tenon.cli.result_view import show_comparison, show_examples, show_results
    from tenon.service.judging import Question, compare_results, judge, write_records

    session = session_of(ctx)
    assert isinstance(question, Question)
    with make_view(session.err, quiet=as_json) as view:
        results = judge(question, session.settings, view.take)
    if out is not None:
        write_records(out, results)
    comparison = compare_results(*results) if len(results) == 2 else None
    if as_json:
        session.write_json(
            {
                "results": [result.model_dump(mode="json", exclude={"examples"}) for result in results],
                "comparison": comparison.model_dump(mode="json") if comparison else None,
            }
        )
        return
    show_results(session.out, results)
    show_examples(session.out, results[-1])
    if comparison is not None:
        show_comparison(session.out, comparison)
    if out is not None:
        session.err.print(f"records in {out}")
