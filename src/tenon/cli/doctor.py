"""`tenon doctor`: what works on this machine, and what to install."""

from __future__ import annotations

import typer

from tenon.cli.plans import AsJson
from tenon.cli.session import session_of
from tenon.errors import EXIT_ERROR


def doctor(ctx: typer.Context, as_json: AsJson = False) -> None:
    """Try out this machine: versions, driver, GPUs, disk, network, and every kernel, each run and compared.

    Kernels are run on small random inputs and held against their plain references; one that fails is named with what a
    run uses instead. Nothing is installed or changed. The exit status is 1 when training could not work here.
    """
    from tenon.cli.doctor_view import show_doctor
    from tenon.cli.live import make_view
    from tenon.service.doctor import examine

    session = session_of(ctx)
    with make_view(session.err, quiet=as_json) as view:
        report = examine(session.settings, view.take)
    if as_json:
        session.write_json(report.model_dump(mode="json"))
    else:
        show_doctor(session.out, report)
    if report.blocked:
        raise typer.Exit(EXIT_ERROR)
