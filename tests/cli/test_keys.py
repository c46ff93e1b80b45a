"""`tenon keys`: create, list, revoke."""

from __future__ import annotations

import json

from tenon.settings import Settings
from tenon.tenants.keys import KeyStore

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
