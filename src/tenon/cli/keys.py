"""`tenon keys`: who may ask a server, which adapters, and how much."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from tenon.cli.plans import AsJson
from tenon.cli.session import session_of

if TYPE_CHECKING:
    from rich.table import Table

    from tenon.tenants.keys import Key
    from tenon.tenants.usage import Used

keys_app = typer.Typer(
    help="API keys of a server: who may ask, which adapters, and how much.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@keys_app.command("create")
def create(
    ctx: typer.Context,
    tenant: Annotated[str, typer.Argument(metavar="TENANT", help="Whose key it is.")],
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", help="What it may ask, * for any part of a name, `base` for the base; again for more."
        ),
    ] = None,
    requests: Annotated[int | None, typer.Option("--requests-per-minute", min=1)] = None,
    tokens: Annotated[int | None, typer.Option("--tokens-per-minute", min=1)] = None,
    quota: Annotated[int | None, typer.Option("--tokens-per-month", min=1)] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, this once: only its hash is kept."""
    from tenon.service.keys import create_key
    from tenon.tenants.keys import Limits

    session = session_of(ctx)
    limits = Limits(requests_per_minute=requests, tokens_per_minute=tokens, tokens_per_month=quota)
    typed, key = create_key(tenant, session.settings, rights=tuple(adapters or ("*",)), limits=limits)
    if as_json:
        session.write_json({"key": typed, **key.model_dump(mode="json", exclude={"digest"})})
        return
    session.out.print(typed, markup=False, highlight=False, soft_wrap=True)
    session.err.print("it is not shown again; from the first key on, a server of this machine asks for one")


@keys_app.command("list")
def list_all(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List the keys with their rights, limits and what they have used this month."""
    from tenon.service.keys import list_keys

    session = session_of(ctx)
    found = list_keys(session.settings)
    if as_json:
        rows = [
            {**key.model_dump(mode="json", exclude={"digest"}), "tokens": used.tokens, "requests": used.requests}
            for key, used in found
        ]
        session.write_json(rows)
    elif found:
        session.out.print(_table(found))
    else:
        session.err.print("there is no key yet, and a server asks for none; make one: tenon keys create TENANT")


@keys_app.command("revoke")
def revoke(
    ctx: typer.Context, number: Annotated[str, typer.Argument(metavar="ID", help="As `tenon keys list` shows it.")]
) -> None:
    """Refuse a key from now on, also in servers that run."""
    from tenon.service.keys import revoke_key

    session = session_of(ctx)
    key = revoke_key(number, session.settings)
    session.out.print(f"revoked: {key.id} of {key.tenant}", markup=False, highlight=False)


def _table(found: list[tuple[Key, Used]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    for head in ("key", "tenant", "may ask", "limits", "this month", "made"):
        table.add_column(head, no_wrap=head != "may ask")
    for key, used in found:
        made = f"{datetime.fromtimestamp(key.created).astimezone():%Y-%m-%d %H:%M}"
        table.add_row(
            Text(key.id, "strike" if key.revoked else "bold"),
            Text(key.tenant),
            Text(", ".join(key.rights)),
            Text("revoked" if key.revoked else _limits(key)),
            Text(f"{used.tokens:,} tokens, {used.requests:,} requests"),
            Text(made, "dim"),
        )
    return table


def _limits(key: Key) -> str:
    limits = key.limits
    parts = [
        (limits.requests_per_minute, "requests/min"),
        (limits.tokens_per_minute, "tokens/min"),
        (limits.tokens_per_month, "tokens/month"),
    ]
    return ", ".join(f"{count:,} {unit}" for count, unit in parts if count is not None) or "none"
