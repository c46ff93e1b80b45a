"""One run on screen: the run with its curve and its plan against what it took, and how a training ended.

This module does not know how a run works.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tenon.cli.gpu_view import gpu_text
from tenon.cli.progress_state import metrics_text, sparkline
from tenon.cli.proof_view import proof_text, proof_words
from tenon.cli.result_view import show_results
from tenon.cli.run_list_view import STATE_STYLES, run_note, status_tree
from tenon.cli.session import Session
from tenon.runs.folder import RunFolder
from tenon.service.judging import compare_results
from tenon.service.runs import RunReport, describe_run, read_pairs, read_results
from tenon.units import format_bytes, format_count, format_seconds

_CURVE_COLUMNS = 60


def show_run(console: Console, report: RunReport) -> None:
    """One run: state, curves, validations, results, plan against actual."""
    state = report.status
    names = ", ".join(slot.name for slot in report.plan.slots)
    console.print(
        Text.assemble(
            (report.run.name, "bold"),
            "  ",
            (state.state, STATE_STYLES[state.state]),
            f"  {names} on {report.plan.base.spec}, step {state.step:,}",
        )
    )
    if note := run_note(report.run, state):
        console.print(Text(f"  {note}", "yellow"), soft_wrap=True)
    for slot, losses in report.losses.items():
        if losses:
            ends = f"{losses[0]:.4f} to {losses[-1]:.4f}"
            curve = (sparkline(losses, _CURVE_COLUMNS), "green")
            console.print(Text.assemble((f"  loss of {slot}: ", "dim"), curve, f" {ends}"))
        for event in report.validations[slot][-3:]:
            console.print(Text(f"  validation, step {event.get('step')}: {metrics_text(event)}", "dim"))
    if report.memory:
        console.print(Text(f"  memory: {report.memory}", "dim"), soft_wrap=True)
    if gpu := gpu_text(report.gpus):
        console.print(Text(f"  {gpu}", "dim"), soft_wrap=True)
    if proof := proof_text(report.proof):
        console.print(Text(f"  {proof}", "dim"), soft_wrap=True)
    for warning in report.warnings[-5:]:
        console.print(Text.assemble(("  warning: ", "yellow"), warning), soft_wrap=True)
    _show_pairs(console, report)
    console.print()
    console.print(plan_against_actual(report))
    for name in report.registered:
        console.print(Text.assemble(("  registered: ", "dim"), (name, "bold")))


def plan_against_actual(report: RunReport) -> Table:
    """The estimate beside what it took: memory, time, tokens, steps."""
    estimate, actual = report.plan.estimate, report.actual
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    for head in ("", "planned", "actual"):
        table.add_column(head, no_wrap=True)
    table.add_row("time", f"about {format_seconds(estimate.seconds)}", format_seconds(actual.seconds))
    memory = format_bytes(actual.memory_bytes) if actual.memory_bytes else "-"
    table.add_row("memory", f"about {format_bytes(estimate.memory_bytes)}", memory)
    table.add_row("tokens", f"about {format_count(estimate.train_tokens)}", format_count(actual.tokens))
    about = "" if estimate.exact_steps else "about "
    table.add_row("steps", f"{about}{format_count(estimate.steps)}", format_count(actual.steps))
    if report.proof is not None:
        table.add_row("path", "fused kernels", proof_words(report.proof))
    return table


def show_outcome(session: Session, run: RunFolder) -> None:
    """How a training ended: before and after, what was registered, plan against actual, what to type next."""
    report = describe_run(run)
    _show_pairs(session.out, report)
    session.err.print()
    session.err.print(plan_against_actual(report))
    for name in report.registered:
        session.out.print(Text.assemble("registered ", (name, "bold green")))
    session.err.print(Text("next:", "dim"))
    for command in next_commands(report):
        session.err.print(Text(f"  {command}", "bold"), soft_wrap=True)


def _show_pairs(console: Console, report: RunReport) -> None:
    """Base against adapter for each slot, and the sentence that says what differs."""
    for base, own in read_pairs(report.run, report.plan):
        console.print()
        show_results(console, (base, own))
        console.print(Text(compare_results(base, own).sentence, "bold"), soft_wrap=True)


def next_commands(report: RunReport) -> list[str]:
    """What a user may want to type after a training."""
    commands = [f"tenon show {report.run.path}"]
    if report.registered:
        name = report.registered[0].partition("@")[0]
        commands = [f"tenon chat {name}", f"tenon adapters show {name}", *commands]
        if not report.run.result_names():
            commands.insert(1, f"tenon eval {name} --data FILE")
    return commands


def report_tree(report: RunReport) -> dict[str, Any]:
    """A run's report for JSON."""
    estimate = report.plan.estimate
    return {
        **status_tree(report.run, report.status),
        "base": report.plan.base.spec,
        "losses": report.losses,
        "validations": report.validations,
        "registered": list(report.registered),
        "warnings_text": list(report.warnings),
        "memory": report.memory,
        "proof": report.proof,
        "gpus": list(report.gpus),
        "planned": estimate.model_dump(mode="json"),
        "actual": dataclasses.asdict(report.actual),
        "results": [result.model_dump(mode="json", exclude={"examples"}) for result in read_results(report.run)],
    }
