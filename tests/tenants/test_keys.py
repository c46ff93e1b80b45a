"""Keys: shown once, kept as hashes, known at once everywhere, refused at once when revoked."""

from __future__ import annotations

import hashlib
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tenon.errors import AccessError
from tenon.tenants.keys import KeyStore, Limits
from tests.conftest import REPOSITORY

CREATES = """
import sys
from pathlib import Path
from tenon.tenants.keys import KeyStore

store = KeyStore(Path(sys.argv[1]))
for number in range(20):
    store.create(f"{sys.argv[2]}-{number}")
"""


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "home" / "keys.json")


def denied(store: KeyStore, typed: str, purpose: str = "public") -> None:
    with pytest.raises(AccessError) as error:
        store.find(typed, purpose)  # pyright: ignore[reportArgumentType]
    assert error.value.code == "access-denied" and error.value.hint
    assert not typed.strip() or typed.strip() == "tn-" or typed not in str(error.value)


def test_a_key_is_found_by_what_was_shown_and_nothing_else(store: KeyStore) -> None:
    typed, key = store.create("acme", rights=("support-*",), limits=Limits(tokens_per_minute=100))
    assert store.find(typed) == key and key.tenant == "acme"
    wrong = typed[:-1] + ("A" if typed[-1] != "A" else "B")
    for other in ("", "tn-", wrong, typed[:-1], typed + "x", typed.upper(), f"tn-00000000-{typed[12:]}", " " + typed):
        denied(store, other)
    denied(store, typed, "management")


def test_the_file_holds_no_secret_and_is_for_its_owner_alone(store: KeyStore) -> None:
    typed, key = store.create("acme")
    text = store.path.read_text()
    secret = typed.removeprefix(f"tn-{key.id}-")
    assert len(secret) == 43 and secret not in text and hashlib.sha256(secret.encode()).hexdigest() in text
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600


def test_a_running_server_sees_new_and_revoked_keys(store: KeyStore) -> None:
    server = KeyStore(store.path)
    assert server.keys() == {}
    typed, key = store.create("acme")
    assert server.find(typed) == key
    store.revoke(key.id)
    denied(server, typed)
    with pytest.raises(AccessError) as error:
        store.revoke("ffffffff")
    assert error.value.code == "access-unknown-key"


def test_a_key_expires(tmp_path: Path) -> None:
    now = [1000.0]
    store = KeyStore(tmp_path / "keys.json", clock=lambda: now[0])
    typed, key = store.create("acme", lasts_seconds=60.0)
    assert key.expires == 1060.0
    now[0] = 1059.0
    assert store.find(typed).id == key.id
    now[0] = 1060.0
    denied(store, typed)
    for wrong in (0.0, -1.0, float("nan"), float("inf"), 1e12):
        with pytest.raises(AccessError, match="access-bad-key"):
            store.create("acme", lasts_seconds=wrong)


def test_a_rotated_key_and_its_heir_are_one_account_and_both_valid_for_a_while(tmp_path: Path) -> None:
    now = [1000.0]
    store = KeyStore(tmp_path / "keys.json", clock=lambda: now[0])
    old_typed, old = store.create("acme", rights=("low",), limits=Limits(tokens_per_month=5), lasts_seconds=500.0)
    now[0] = 1100.0
    typed, key = store.rotate(old.id, grace_seconds=60.0)
    assert (key.account, key.tenant, key.rights, key.limits) == (old.account, "acme", ("low",), old.limits)
    assert key.id != old.id and key.expires == 1600.0
    assert store.find(typed).id == key.id and store.find(old_typed).expires == 1160.0
    now[0] = 1160.0
    denied(store, old_typed)
    assert store.find(typed) == key
    with pytest.raises(AccessError, match="access-bad-key"):
        store.rotate(old.id, grace_seconds=60.0)
    with pytest.raises(AccessError, match="access-unknown-key"):
        store.rotate("ffffffff", grace_seconds=60.0)
    store.rotate(key.id, grace_seconds=10**9)
    assert store.get(key.id).expires == 1600.0, "a grace makes no key last longer"
    third = store.rotate(store.create("acme")[1].id, grace_seconds=0.0)[1]
    assert third.expires is None


@pytest.mark.parametrize(
    ("rights", "name", "may"),
    [
        (("*",), "anything@3", True),
        (("support-*",), "support-bot", True),
        (("support-*",), "support-bot@prod", True),
        (("support-bot",), "support-bot@3", True),
        (("support-bot@prod",), "support-bot@prod", True),
        (("support-bot@prod",), "support-bot@canary", False),
        (("support-bot@prod",), "support-bot", False),
        (("support-*",), "sales", False),
        (("support-*",), "base", False),
        (("base",), "base", True),
        ((), "anything", False),
    ],
)
def test_rights(store: KeyStore, rights: tuple[str, ...], name: str, may: bool) -> None:
    assert store.create("acme", rights=rights)[1].may_ask(name) is may


def test_bad_words_are_refused(store: KeyStore) -> None:
    for tenant, rights in (("", ("*",)), ("../x", ("*",)), ("acme", ("../x",)), ("acme", ("a b",)), ("acme", ("",))):
        with pytest.raises(AccessError) as error:
            store.create(tenant, rights=rights)
        assert error.value.code == "access-bad-key" and error.value.hint
    assert store.keys() == {}


def test_a_damaged_file_denies_everybody_and_says_so(store: KeyStore) -> None:
    typed, _ = store.create("acme")
    store.path.write_text("{")
    with pytest.raises(AccessError) as error:
        store.find(typed)
    assert error.value.code == "access-damaged"


def test_keys_made_at_the_same_time_are_all_there(store: KeyStore) -> None:
    makers = [
        subprocess.Popen([sys.executable, "-c", CREATES, str(store.path), name], cwd=REPOSITORY) for name in ("a", "b")
    ]
    assert [maker.wait() for maker in makers] == [0, 0]
    assert {key.tenant for key in store.keys().values()} == {f"{name}-{n}" for name in ("a", "b") for n in range(20)}
