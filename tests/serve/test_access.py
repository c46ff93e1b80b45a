"""Keys over HTTP: who is let in, what they see, and how much they may ask; aliases with their shares."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai import OpenAI

from tenon.serve.front.access import Access
from tenon.tenants.keys import KeyStore, Limits
from tenon.tenants.usage import UsageBook, Used
from tests.serve.house import House, Running, serving, wait_until


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> KeyStore:
    return KeyStore(tmp_path_factory.mktemp("keys") / "keys.json")


@pytest.fixture(scope="module")
def book(store: KeyStore) -> UsageBook:
    return UsageBook(store.path.with_name("usage.db"))


@pytest.fixture(scope="module")
def guarded(house: House, store: KeyStore, book: UsageBook) -> Iterator[Running]:
    with serving(house, access=Access(store, book)) as started:
        yield started


def client_of(running: Running, key: str) -> OpenAI:
    return OpenAI(base_url=running.url, api_key=key, max_retries=0, timeout=30)


def test_a_key_of_the_management_api_opens_nothing_here_and_asks_nobody_for_one(house: House, tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.json")
    typed, _ = store.create("ops", purpose="management")
    with serving(house, access=Access(store, UsageBook(tmp_path / "usage.db"))) as running:
        assert running.ask("/v1/models")[0] == 200
        store.create("acme")
        with pytest.raises(openai.AuthenticationError):
            client_of(running, typed).models.list()


def test_a_server_without_keys_asks_for_none_and_with_the_first_one_it_does(house: House, tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.json")
    with serving(house, access=Access(store, UsageBook(tmp_path / "usage.db"))) as running:
        client = client_of(running, "none")
        assert client.completions.create(model="base", prompt="the", max_tokens=1).usage
        typed, key = store.create("acme")
        with pytest.raises(openai.AuthenticationError) as error:
            client.completions.create(model="base", prompt="the", max_tokens=1)
        assert error.value.code == "invalid_api_key" and error.value.response.headers["WWW-Authenticate"] == "Bearer"
        assert client_of(running, typed).completions.create(model="base", prompt="the", max_tokens=1).usage
        store.revoke(key.id)
        with pytest.raises(openai.AuthenticationError):
            client_of(running, typed).models.list()
        assert running.ask("/health")[0] == running.ask("/ready")[0] == 200
        store.path.write_text("{")
        assert running.ask("/v1/models")[0] == 503


def test_rights_are_to_names_and_what_nobody_may_ask_is_not_listed(guarded: Running, store: KeyStore) -> None:
    client = client_of(guarded, store.create("acme", rights=("low",))[0])
    assert client.completions.create(model="low@1", prompt="the", max_tokens=1).model == "low@1"
    for name in ("high", "base", "tiny", "high@1"):
        with pytest.raises(openai.PermissionDeniedError):
            client.completions.create(model=name, prompt="the", max_tokens=1)
    with pytest.raises(openai.PermissionDeniedError):
        client.models.retrieve("high")
    assert {model.id.partition("@")[0] for model in client.models.list()} == {"low"}
    of_base = client_of(guarded, store.create("acme", rights=("base",))[0])
    assert [model.id for model in of_base.models.list()] == ["tiny"]
    assert of_base.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=1)


def test_rates_say_when_to_come_back(guarded: Running, store: KeyStore) -> None:
    client = client_of(guarded, store.create("acme", limits=Limits(requests_per_minute=2))[0])
    for _ in range(2):
        client.completions.create(model="base", prompt="the", max_tokens=1)
    with pytest.raises(openai.RateLimitError) as error:
        client.completions.create(model="base", prompt="the", max_tokens=1)
    assert error.value.code == "rate_limit_exceeded" and 1 <= int(error.value.response.headers["Retry-After"]) <= 31


def test_tokens_that_an_answer_did_not_use_are_given_back(guarded: Running, store: KeyStore, book: UsageBook) -> None:
    typed, key = store.create("acme", limits=Limits(tokens_per_minute=100, tokens_per_month=60))
    client = client_of(guarded, typed)

    def ask(most: int) -> int:
        found = client.completions.create(
            model="base",
            prompt=[5],
            max_tokens=most,
            seed=1,
            stop=["e", "a", "t", "o", "n", " "],
            extra_body={"ignore_eos": True},
        )
        assert found.usage is not None
        return found.usage.total_tokens

    first = ask(55)
    assert first < 30, "a stop string came early"
    wait_until(lambda: book.used(key.id).tokens == first and book.used(key.id).reserved_tokens == 0)
    second = ask(25)
    wait_until(lambda: book.used(key.id).tokens == first + second)
    with pytest.raises(openai.RateLimitError) as error:
        ask(59)
    assert error.value.code == "insufficient_quota" and "Retry-After" not in error.value.response.headers
    assert book.used(key.id).reserved_tokens == 0


def test_an_account_has_so_many_requests_at_a_time(guarded: Running, store: KeyStore) -> None:
    typed, key = store.create("acme", limits=Limits(concurrent_requests=2))
    other, _ = store.rotate(key.id, grace_seconds=60.0)
    client, heir = client_of(guarded, typed), client_of(guarded, other)
    long = {"ignore_eos": True}
    held = [
        each.completions.create(model="base", prompt="the", max_tokens=200, stream=True, extra_body=long)
        for each in (client, heir)
    ]
    with pytest.raises(openai.RateLimitError) as error:
        client.completions.create(model="base", prompt="the", max_tokens=1)
    assert error.value.code == "too_many_at_once" and error.value.response.headers["Retry-After"]
    assert client_of(guarded, store.create("other")[0]).completions.create(model="base", prompt="x", max_tokens=1)
    held[0].close()
    wait_until(lambda: guarded.server.gate.open == 1)
    list(held[1])
    for _ in range(20):  # one after the other is never too many
        list(client.completions.create(model="base", prompt="the", max_tokens=2, stream=True))


def test_what_has_just_ended_is_given_back_before_the_next_is_refused(guarded: Running, store: KeyStore) -> None:
    client = client_of(guarded, store.create("acme", limits=Limits(tokens_per_month=450))[0])
    for _ in range(10):
        # Two reservations of 241 tokens do not fit, so each needs what the one before did not use.
        client.completions.create(model="base", prompt=[5], max_tokens=240, stop=["e", "a", "t", "o", "n", " "])


def test_what_is_refused_after_it_was_let_in_costs_nothing(guarded: Running, store: KeyStore, book: UsageBook) -> None:
    typed, key = store.create("acme")
    with pytest.raises(openai.BadRequestError):
        client_of(guarded, typed).completions.create(model="base", prompt=[5], max_tokens=1, n=100)
    wait_until(lambda: book.used(key.id) == Used())


def test_a_stream_that_is_cut_off_pays_for_what_was_said(guarded: Running, store: KeyStore, book: UsageBook) -> None:
    typed, key = store.create("acme", limits=Limits(tokens_per_month=10_000))
    client = client_of(guarded, typed)
    with client.completions.create(
        model="base", prompt=[5], max_tokens=50, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
    wait_until(lambda: book.used(key.id).requests == 1)
    used = book.used(key.id)
    assert used.reserved_tokens == 0 and 2 <= used.tokens <= 51


def test_many_at_once_never_pass_a_quota(guarded: Running, store: KeyStore, book: UsageBook) -> None:
    typed, key = store.create("acme", limits=Limits(tokens_per_month=60))
    told: list[int] = []

    def ask() -> None:
        client = client_of(guarded, typed)
        for _ in range(5):
            try:
                found = client.completions.create(
                    model="base", prompt=[5], max_tokens=4, extra_body={"ignore_eos": True}
                )
                assert found.usage is not None
                told.append(found.usage.total_tokens)
            except openai.RateLimitError:
                continue

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: book.used(key.id).reserved_tokens == 0)
    assert sum(told) == book.used(key.id).tokens == 60


def test_an_alias_answers_by_its_shares_and_moves_without_a_restart(
    house: House, guarded: Running, store: KeyStore
) -> None:
    house.register("bot", rank=2, seed=3)
    house.register("bot", rank=3, seed=4)
    client = client_of(guarded, store.create("acme")[0])

    def asked() -> str:
        return client.completions.create(model="bot@prod", prompt="the", max_tokens=1).model

    with pytest.raises(openai.NotFoundError):
        asked()
    house.registry.set_alias("bot@prod", {1: 1.0})
    assert asked() == "bot@1"
    house.registry.set_alias("bot@prod", {2: 1.0})
    assert asked() == "bot@2"
    assert "bot@prod" in {model.id for model in client.models.list()}
    house.registry.set_alias("bot@prod", {1: 50.0, 2: 50.0})
    assert {asked() for _ in range(40)} == {"bot@1", "bot@2"}
    house.registry.roll_back("bot@prod")
    assert {asked() for _ in range(5)} == {"bot@2"}


def test_no_tenant_is_answered_from_what_is_remembered_of_another(guarded: Running, store: KeyStore) -> None:
    prompt = "the weather at the lake, and the leather that they saw together when the others were there"

    def hits(tenant: str) -> int:
        before = guarded.server.engine.load.prefix_hit_tokens
        client_of(guarded, store.create(tenant)[0]).completions.create(model="low", prompt=prompt, max_tokens=1)
        return guarded.server.engine.load.prefix_hit_tokens - before

    assert hits("asks-first") == 0 and hits("asks-first") > 0
    assert hits("asks-too") == 0
