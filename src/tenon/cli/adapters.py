"""`tenon adapters`: what is registered, where it came from, whether it is still whole; in and out as PEFT folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tenon.cli.plans import AsJson
from tenon.cli.session import session_of

adapters_app = typer.Typer(
    help="Registered adapters: versions with the hashes of all that they were made of.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
_UNSAID = "Where a request does not say it."
Name = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="Without a version, the newest.")]
AliasName = Annotated[str, typer.Argument(metavar="NAME@ALIAS", help="For example support-bot@prod.")]


@adapters_app.command("list")
def list_adapters(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List the registered adapters with their versions."""
    from tenon.cli.adapter_view import entries_table
    from tenon.cli.failures import show_error
    from tenon.service.adapters import list_entries

    session = session_of(ctx)
    entries = list_entries(session.settings, lambda damaged: show_error(session.err, damaged))
    if as_json:
        session.write_json([entry.model_dump(mode="json") for entry in entries])
    elif entries:
        session.out.print(entries_table(entries))
    else:
        session.err.print("no adapter is registered yet; train one: tenon train recipes/quickstart.yaml")


@adapters_app.command("show")
def show(ctx: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Show one version: what it is, what it was made of, how it was judged."""
    from tenon.cli.adapter_view import show_entry
    from tenon.service.adapters import entry_folder, get_entry

    session = session_of(ctx)
    entry = get_entry(name, session.settings)
    if as_json:
        session.write_json(entry.model_dump(mode="json"))
    else:
        show_entry(session.out, entry, entry_folder(entry, session.settings))


@adapters_app.command("verify")
def verify(
    ctx: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME[@VERSION]", help="Without a name, every version of every adapter.")
    ] = None,
) -> None:
    """Check that every file is as it was registered."""
    from tenon.service.adapters import verify_entries

    session = session_of(ctx)
    for entry in verify_entries(name, session.settings):
        session.out.print(f"{entry.label}: whole", highlight=False)


@adapters_app.command("export")
def export(
    ctx: typer.Context,
    name: Name,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that does not exist yet.")],
) -> None:
    """Write a version as a folder that PEFT and vLLM load."""
    from tenon.service.adapters import export_entry

    session = session_of(ctx)
    export_entry(name, folder, session.settings)
    session.out.print(f"{folder}")


@adapters_app.command("import")
def import_adapter(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name to register it under.")],
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="adapter_config.json and adapter_model.safetensors.")
    ],
    base: Annotated[str, typer.Option("--base", help="The base that it was trained on.")],
    template: Annotated[
        Path | None,
        typer.Option("--template", help="Its chat template; by default chat_template.jinja of the folder, if any."),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message where a chat brings none.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0, max=2, help=_UNSAID)] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", min=0.001, max=1, help=_UNSAID)] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", min=0, help=_UNSAID)] = None,
    min_p: Annotated[float | None, typer.Option("--min-p", min=0, max=1, help=_UNSAID)] = None,
    repetition: Annotated[float | None, typer.Option("--repetition-penalty", min=0.01, max=2, help=_UNSAID)] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help=_UNSAID)] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="A text that ends an answer; may be repeated.")
    ] = None,
    stop_token: Annotated[
        list[str] | None, typer.Option("--stop-token", help="A token of the base that does; may be repeated.")
    ] = None,
) -> None:
    """Register a PEFT folder that was made elsewhere, and say how it is asked where a request does not."""
    from tenon.plan.values import Generation
    from tenon.registry.entry_files import TEMPLATE_NAME
    from tenon.service.adapters import import_folder

    session = session_of(ctx)
    generation = Generation(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition,
        max_tokens=max_tokens,
        stop=tuple(filter(None, stop or ())),
        stop_tokens=tuple(filter(None, stop_token or ())),
    )
    entry = import_folder(name, folder, base, session.settings, template=template, system=system, generation=generation)
    session.out.print(entry.label)
    if TEMPLATE_NAME in entry.beside and template is None:
        session.err.print(f"with its own chat template: {folder / TEMPLATE_NAME}", markup=False)


@adapters_app.command("remove")
def remove(
    ctx: typer.Context,
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a version from the registry; there is no way back."""
    from tenon.service.adapters import label_of, remove_entry

    session = session_of(ctx)
    label = label_of(name, session.settings)
    if not yes:
        typer.confirm(f"remove {label} for good?", abort=True, err=True)
    session.out.print(f"removed {remove_entry(label, session.settings)}")


@adapters_app.command("alias")
def alias(
    ctx: typer.Context,
    name: AliasName,
    versions: Annotated[
        list[str], typer.Argument(metavar="VERSION[:SHARE]...", help="One version, or several with their shares.")
    ],
    shadow: Annotated[
        int | None, typer.Option("--shadow", metavar="VERSION", help="Asked too; its answers are only counted.")
    ] = None,
    sticky: Annotated[
        bool, typer.Option("--sticky", help="Of several versions each tenant is dealt one, and keeps it.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Also a version that the guard's metric keeps out.")] = False,
) -> None:
    """Let NAME@ALIAS stand for a version, or for several with shares (3:95 4:5), from this instant on."""
    from tenon.service.adapters import set_alias

    session = session_of(ctx)
    moved = set_alias(name, versions, shadow, session.settings, sticky=sticky, force=force)
    session.out.print(f"{name}: {moved.target.describe()}", markup=False)


@adapters_app.command("guard")
def guard(
    ctx: typer.Context,
    name: AliasName,
    errors: Annotated[
        float | None,
        typer.Option("--errors", min=0, max=0.999, help="Largest share of requests that a new version may fail."),
    ] = None,
    requests: Annotated[int, typer.Option("--requests", min=1, help="Requests before --errors is looked at.")] = 20,
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="How far back --errors looks.")] = 600.0,
    metric: Annotated[
        str | None, typer.Option("--metric", help="A version worse in this metric than the one before is kept out.")
    ] = None,
    drop: Annotated[float, typer.Option("--drop", min=0, help="By how much it may be worse.")] = 0.0,
    off: Annotated[bool, typer.Option("--off", help="Take the guard away.")] = False,
) -> None:
    """Guard NAME@ALIAS: servers roll it back by themselves when the version that it was moved to fails too often, and a
    version that was judged worse is kept out.
    """
    from tenon.registry.aliases import Guard
    from tenon.service.adapters import guard_alias

    session = session_of(ctx)
    if off == (errors is not None or metric is not None):
        raise typer.BadParameter("give --errors or --metric, or --off", param_hint="--errors")
    wanted = Guard(errors=errors, requests=requests, seconds=seconds, metric=metric, drop=drop)
    guarded = guard_alias(name, None if off else wanted, session.settings)
    said = "no guard" if guarded.guard is None else guarded.guard.describe()
    session.out.print(f"{name}: {said}", markup=False)


@adapters_app.command("rollback")
def rollback(ctx: typer.Context, name: AliasName) -> None:
    """Let NAME@ALIAS stand for what it stood for before."""
    from tenon.service.adapters import roll_back_alias

    session = session_of(ctx)
    session.out.print(f"{name}: {roll_back_alias(name, session.settings).target.describe()}", markup=False)


@adapters_app.command("aliases")
def aliases(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List the aliases of all adapters with what they stand for, and what they stood for before."""
    from tenon.cli.adapter_view import aliases_table
    from tenon.service.adapters import list_aliases

    session = session_of(ctx)
    found = list_aliases(session.settings)
    if as_json:
        session.write_json({name: each.model_dump(mode="json") for name, each in found.items()})
    elif found:
        session.out.print(aliases_table(found))
    else:
        session.err.print("there is no alias yet; set one: tenon adapters alias NAME@prod VERSION")


@adapters_app.command("unalias")
def unalias(ctx: typer.Context, name: AliasName) -> None:
    """Forget an alias; the versions that it stood for stay."""
    from tenon.service.adapters import remove_alias

    session = session_of(ctx)
    remove_alias(name, session.settings)
    session.out.print(f"forgotten: {name}", markup=False)
