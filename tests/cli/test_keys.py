"""`tenon keys`: create, list, revoke."""

from __future__ import annotations

import json

from tenon.settings import Settings
from tenon.tenants.keys import KeyStore
from tenon.tenants.usage import UsageBook

from .conftest import Command


def test_a_key_is_shown_once_listed_and_revoked(tenon: Command, fake_settings: Settings) -> None:
    assert "asks for none" in tenon("keys", "list").err
    made = tenon("keys", "create", "acme", "--adapter", "support-*", "--tokens-per-month", "1000")
    typed = made.out.strip()
    key = KeyStore(fake_settings.keys).find(typed)
    assert key.rights == ("support-*",) and key.limits.tokens_per_month == 1000 and "not shown again" in made.err
    listed = tenon("keys", "list").out
    assert key.id in listed and "acme" in listed and "1,000 tokens/month" in listed and typed not in listed
    (row,) = json.loads(tenon("keys", "list", "--json").out)
    assert row["tenant"] == "acme" and row["tokens"] == 0 and "digest" not in row
    assert tenon("keys", "revoke", key.id).out == f"revoked: {key.id} of acme\n"
    assert "revoked" in tenon("keys", "list").out


def test_bad_words_are_refused(tenon: Command) -> None:
    done = tenon("keys", "create", "../acme")
    assert done.status == 1 and "error[access-bad-key]" in done.err and "hint:" in done.err
    done = tenon("keys", "revoke", "nobody")
    assert done.status == 1 and "error[access-unknown-key]" in done.err
    assert json.loads(tenon("keys", "create", "acme", "--json").out)["key"].startswith("tn-")


def test_listing_takes_nothing_from_a_server_that_runs(tenon: Command, fake_settings: Settings) -> None:
    """The book is opened to be read: what a server has reserved stays reserved."""
    key = json.loads(tenon("keys", "create", "acme", "--json").out)
    book = UsageBook(fake_settings.usage)
    assert book.reserve(key["account"], 100, None)
    before = {place: place.stat().st_mtime_ns for place in fake_settings.usage.parent.glob("usage.db-owners/*")}
    assert "acme" in tenon("keys", "list").out
    assert book.used(key["account"]).reserved_tokens == 100
    assert {place: place.stat().st_mtime_ns for place in fake_settings.usage.parent.glob("usage.db-owners/*")} == before


def test_keys_expire_are_rotated_and_say_what_they_used(tenon: Command, fake_settings: Settings) -> None:
    made = json.loads(tenon("keys", "create", "acme", "--expires", "90d", "--concurrent", "3", "--json").out)
    assert made["expires"] - made["created"] == 90 * 86_400 and made["limits"]["concurrent_requests"] == 3
    heir = json.loads(tenon("keys", "rotate", made["id"], "--grace", "1h", "--json").out)
    assert heir["account"] == made["id"] and heir["key"] != made["key"]
    store, book = KeyStore(fake_settings.keys), UsageBook(fake_settings.usage)
    assert store.find(made["key"]).tenant == store.find(heir["key"]).tenant == "acme"
    reservation = book.reserve(made["account"], 10, None)
    assert reservation is not None
    book.settle(reservation, 7)
    book.see(heir["id"])
    (month,) = json.loads(tenon("keys", "usage", heir["id"], "--json").out)
    assert month["tokens"] == 7 and "7 tokens, 1 requests" in tenon("keys", "usage", made["id"]).out
    rows = {row["id"]: row for row in json.loads(tenon("keys", "list", "--json").out)}
    assert rows[heir["id"]]["last_used"] and rows[made["id"]]["last_used"] is None
    assert "3 at a time; until" in tenon("keys", "list").out
    done = tenon("keys", "create", "acme", "--expires", "soon")
    assert done.status == 1 and "error[access-bad-key]" in done.err
    manages = json.loads(tenon("keys", "create", "ops", "--manage", "--json").out)
    assert store.find(manages["key"], "management").tenant == "ops" and "management" in tenon("keys", "list").out
    assert tenon("keys", "rotate", "nobody").status == 1
