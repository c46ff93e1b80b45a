"""`tenon runs` and `tenon show`: which runs there are, and how one went."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tenon.cli.plans import AsJson
from tenon.cli.session import session_of


def runs(
    ctx: typer.Context,
    root: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the run folders lie.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List the runs of a folder with their state, newest first."""
    from tenon.cli.run_list_view import runs_table, status_tree
    from tenon.service.run_list import all_runs

    session = session_of(ctx)
    found = all_runs(root)
    if as_json:
        session.write_json([status_tree(run, state) for run, state in found])
    elif found:
        session.out.print(runs_table(found))
    else:
        session.err.print(f"no run under {root}; start one: tenon train recipes/quickstart.yaml")


def show(
    ctx: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, a name under ./runs, or `latest`.")],
    as_json: AsJson = False,
) -> None:
    """Show one run: its state, the curve of its loss, validations, results, and the plan against what it took."""
    from tenon.cli.run_view import report_tree, show_run
    from tenon.service.run_list import open_run
    from tenon.service.runs import describe_run

    session = session_of(ctx)
    report = describe_run(open_run(run))
    if as_json:
        session.write_json(report_tree(report))
    else:
        show_run(session.out, report)
