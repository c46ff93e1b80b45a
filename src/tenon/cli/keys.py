"""`tenon keys`: who may ask a server, which adapters, and how much."""

from __future__ import annotations

import time
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from tenon.cli.plans import AsJson
from tenon.cli.session import Session, session_of

if TYPE_CHECKING:
    from rich.table import Table

    from tenon.service.keys import Listed
    from tenon.tenants.keys import Key

keys_app = typer.Typer(
    help="API keys of a server: who may ask, which adapters, and how much.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


KeyId = Annotated[str, typer.Argument(metavar="ID", help="As `tenon keys list` shows it.")]


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
    concurrent: Annotated[int | None, typer.Option("--concurrent", min=1, help="Requests at a time.")] = None,
    expires: Annotated[str | None, typer.Option("--expires", help="How long it is valid: 90d, 12h.")] = None,
    manage: Annotated[
        bool,
        typer.Option("--manage", help="A key of the management API (`tenon serve --manage`), and of nothing else."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, this once: only its hash is kept."""
    from tenon.service.keys import create_key
    from tenon.tenants.keys import Limits

    session = session_of(ctx)
    limits = Limits(
        requests_per_minute=requests,
        tokens_per_minute=tokens,
        tokens_per_month=quota,
        concurrent_requests=concurrent,
    )
    typed, key = create_key(
        tenant,
        session.settings,
        rights=tuple(adapters or ("*",)),
        limits=limits,
        purpose="management" if manage else "public",
        expires=expires,
    )
    after = "it opens the management API" if manage else "from the first key on, a server of this machine asks for one"
    _show_once(session, typed, key, after, as_json=as_json)


@keys_app.command("list")
def list_all(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List the keys with their rights, limits and what they have used this month."""
    from tenon.service.keys import list_keys

    session = session_of(ctx)
    found = list_keys(session.settings)
    if as_json:
        session.write_json([_row(listed) for listed in found])
    elif found:
        session.out.print(_table(found))
    else:
        session.err.print("there is no key yet, and a server asks for none; make one: tenon keys create TENANT")


@keys_app.command("rotate")
def rotate(
    ctx: typer.Context,
    number: KeyId,
    grace: Annotated[str, typer.Option("--grace", help="How long the old key stays valid.")] = "24h",
    as_json: AsJson = False,
) -> None:
    """Make a key in the place of another: same tenant, rights, limits and usage; the old one ends after --grace."""
    from tenon.service.keys import rotate_key

    session = session_of(ctx)
    typed, key = rotate_key(number, session.settings, grace=grace)
    _show_once(session, typed, key, f"the old one is valid for {grace} more at most", as_json=as_json)


@keys_app.command("usage")
def usage(ctx: typer.Context, number: KeyId, as_json: AsJson = False) -> None:
    """What a key, with those that it was rotated from or to, has used in each month (UTC)."""
    from tenon.service.keys import key_usage

    session = session_of(ctx)
    months = key_usage(number, session.settings)
    if as_json:
        session.write_json(
            [{"month": month, "tokens": used.tokens, "requests": used.requests} for month, used in months.items()]
        )
        return
    for month, used in months.items():
        session.out.print(f"{month}  {used.tokens:,} tokens, {used.requests:,} requests", highlight=False)
    if not months:
        session.err.print("nothing yet")


@keys_app.command("revoke")
def revoke(
    ctx: typer.Context,
    number: KeyId,
) -> None:
    """Refuse a key from now on, also in servers that run."""
    from tenon.service.keys import revoke_key

    session = session_of(ctx)
    key = revoke_key(number, session.settings)
    session.out.print(f"revoked: {key.id} of {key.tenant}", markup=False, highlight=False)


def _show_once(session: Session, typed: str, key: Key, after: str, *, as_json: bool) -> None:
    if as_json:
        session.write_json({"key": typed, **key.model_dump(mode="json", exclude={"digest"})})
        return
    session.out.print(typed, markup=False, highlight=False, soft_wrap=True)
    session.err.print(f"it is not shown again; {after}")


def _row(listed: Listed) -> dict[str, object]:
    return {
        **listed.key.model_dump(mode="json", exclude={"digest"}),
        "tokens": listed.used.tokens,
        "requests": listed.used.requests,
        "last_used": listed.last_used,
    }


def _table(found: list[Listed]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    for head in ("key", "tenant", "may ask", "limits", "this month", "last used", "made"):
        table.add_column(head, no_wrap=head != "may ask")
    now = time.time()
    for listed in found:
        key, used = listed.key, listed.used
        table.add_row(
            Text(key.id, "bold" if key.valid_at(now) else "strike"),
            Text(key.tenant),
            Text("management" if key.purpose == "management" else ", ".join(key.rights)),
            Text(_state(key, now)),
            Text(f"{used.tokens:,} tokens, {used.requests:,} requests"),
            Text("never" if listed.last_used is None else f"{_local(listed.last_used):%Y-%m-%d %H:00}"),
            Text(f"{_local(key.created):%Y-%m-%d %H:%M}", "dim"),
        )
    return table


def _local(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds).astimezone()


def _state(key: Key, now: float) -> str:
    """Its limits and its end, or why it opens nothing."""
    if key.revoked:
        return "revoked"
    if not key.valid_at(now):
        return "expired"
    return _limits(key) + ("" if key.expires is None else f"; until {_local(key.expires):%Y-%m-%d %H:%M}")


def _limits(key: Key) -> str:
    limits = key.limits
    parts = [
        (limits.requests_per_minute, "requests/min"),
        (limits.tokens_per_minute, "tokens/min"),
        (limits.tokens_per_month, "tokens/month"),
        (limits.concurrent_requests, "at a time"),
    ]
    return ", ".join(f"{count:,} {unit}" for count, unit in parts if count is not None) or "none"
