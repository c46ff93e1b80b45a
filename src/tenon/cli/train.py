"""`tenon train` and `tenon resume`: a run with a live view, that any stop saves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tenon.cli.plans import Words
from tenon.cli.session import Session, session_of, split_words

if TYPE_CHECKING:
    from tenon.runs.folder import RunFolder
    from tenon.service.training import Training

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; warnings and the final table only.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Events as JSON lines on standard output, nothing else there.")]
Detach = Annotated[bool, typer.Option("--detach", help="Return at once; the run goes on when this terminal is closed.")]


def train(
    ctx: typer.Context, words: Words, quiet: Quiet = False, as_json: JsonLines = False, detach: Detach = False
) -> None:
    """Train an adapter as a recipe says; several recipes are trained together over one base.

    Ctrl-C (and SIGTERM) saves and ends with exit status 75; `tenon resume RUN` goes on exactly there. A second Ctrl-C
    ends at once; then the newest checkpoint is where it goes on. When the terminal is closed the run saves and ends,
    unless it was started with --detach.
    """
    from tenon.cli.plan_view import show_plan
    from tenon.service.plans import make_plan
    from tenon.service.training import new_run

    session = session_of(ctx)
    recipes, overrides = split_words(words)
    planned = make_plan(recipes, overrides, session.settings)
    if not quiet and not as_json:
        show_plan(session.err, planned.plan, choices=False)
    with new_run(planned.plan, planned.recipe_texts) as run:
        _follow(session, run, quiet=quiet, as_json=as_json, detach=detach)


def resume(
    ctx: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, a name under ./runs, or `latest`.")],
    quiet: Quiet = False,
    as_json: JsonLines = False,
    detach: Detach = False,
    devices: Annotated[
        int | None,
        typer.Option("--devices", min=1, max=64, help="Go on with this many GPUs instead of as many as planned."),
    ] = None,
) -> None:
    """Go on with a run that was stopped, killed, or failed: bit for bit as if it had never stopped.

    On another number of GPUs the rows and their order stay the same, and sums are rounded in another order.
    """
    from tenon.service.run_list import open_run

    _follow(session_of(ctx), open_run(run), quiet=quiet, as_json=as_json, detach=detach, devices=devices)


def _follow(
    session: Session, run: RunFolder, *, quiet: bool, as_json: bool, detach: bool, devices: int | None = None
) -> None:
    """Start the worker and show its events until the end."""
    from tenon.errors import StopRequestedError, TenonError
    from tenon.service.training import start_training

    training = start_training(run, session.settings, detach=detach, devices=devices)
    if detach:
        session.err.print(f"the run goes on as process {training.worker.pid}; look at it: tenon show {run.path}")
        session.err.print(f"stop it, saved: kill -TERM {training.worker.pid}")
        return
    try:
        if as_json:
            _stream(session, training)
        else:
            _watch(session, training, quiet=quiet)
    except TenonError as error:
        # The worker does not know how its run was named here.
        resume_it = f"tenon resume {run.path}"
        stopped = isinstance(error, StopRequestedError)
        hint = resume_it if stopped else error.hint.replace("tenon resume RUN", resume_it)
        raise type(error)(error.code, error.what, got=error.got, hint=hint) from error


def _stream(session: Session, training: Training) -> None:
    from tenon.service.training import signals_stop

    with signals_stop(training.worker, lambda _first: None):
        for event in training.events():
            session.write_json(event)
        training.finish()


def _watch(session: Session, training: Training, *, quiet: bool) -> None:
    from tenon.cli.live import make_view
    from tenon.cli.run_view import show_outcome
    from tenon.service.training import signals_stop

    view = make_view(session.err, quiet=quiet)

    def on_stop(first: bool) -> None:
        view.say("stopping: saving a checkpoint (once more to end at once)" if first else "ended at once")

    with view, signals_stop(training.worker, on_stop):
        for event in training.events():
            view.take(event)
        training.finish()
    show_outcome(session, training.run)
