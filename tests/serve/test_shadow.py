"""A shadow is asked what its alias's version has answered: it is compared, and nobody hears, waits for or pays it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tenon.registry.entry import EntryDraft
from tenon.registry.entry_files import TEMPLATE_NAME
from tenon.serve.front.access import Access
from tenon.serve.front.life import ShadowReport
from tenon.tenants.keys import KeyStore
from tenon.tenants.usage import UsageBook
from tests.serve.house import House, Running, make_house, read_stream, serving, wait_until
from tests.serve.test_travels import OWN

TOKENS = 12


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    """`bot` 1; 2 is the same adapter, 3 another one, 4 another one with a template of its own, 5 is damaged."""
    made = make_house(tmp_path_factory.mktemp("shadow"))
    first = made.register("bot", rank=3, seed=10)
    draft = EntryDraft(base_spec=made.base.spec, base_hash=made.base.base_hash)
    made.registry.register("bot", made.registry.folder(first), draft)
    made.register("bot", rank=5, seed=11)
    made.register("bot", rank=5, seed=12, beside={TEMPLATE_NAME: OWN.encode()})
    damaged = made.registry.folder(made.register("bot", rank=5, seed=13)) / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    return made


@pytest.fixture(scope="module")
def running(house: House) -> Iterator[Running]:
    with serving(house, slots=4) as started:
        yield started


def ask(running: Running, model: str, **fields: Any) -> Any:
    body = {"model": model, "prompt": "the lake", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, **fields}
    status, answer = running.ask("/v1/completions", body)
    assert status == 200, answer
    return answer


def report(running: Running, alias: str) -> ShadowReport:
    return next(each for each in running.server.life.shadows() if each.alias == alias)


def settled(running: Running, alias: str, count: int) -> ShadowReport:
    """The report once so many shadows have come to an end."""

    def done() -> bool:
        found = [each.tally for each in running.server.life.shadows() if each.alias == alias]
        return sum(tally.answered + tally.failed + tally.dropped for tally in found) >= count

    wait_until(done, seconds=30)
    return report(running, alias)


@pytest.mark.parametrize("temperature", [0, 1.3])
def test_an_equal_version_answers_alike(house: House, running: Running, temperature: float) -> None:
    alias = f"bot@alike-{int(temperature)}"
    house.registry.set_alias(alias, {1: 1.0}, shadow=2)
    for seed in range(3):
        answer = ask(running, alias, temperature=temperature, seed=seed)
        assert answer["model"] == "bot@1" and answer["usage"]["completion_tokens"] == TOKENS
    found = settled(running, alias, 3)
    assert (found.version, found.tally.answered, found.tally.same_first, found.tally.same_whole) == (2, 3, 3, 3)
    assert found.tally.tokens == 3 * TOKENS and found.logprob_difference == pytest.approx(0.0, abs=1e-4)


def test_another_version_is_scored_on_the_same_answer(house: House, running: Running) -> None:
    """What is counted is what the two adapters say, computed apart from the server."""
    house.registry.set_alias("bot@other", {1: 1.0}, shadow=3)
    ask(running, "bot@other")
    found = settled(running, "bot@other", 1)
    prompt = house.renderer.tokenizer.encode("the lake")
    (mine,) = house.expected([prompt], ["bot@1"], max_new_tokens=TOKENS, stop_ids=frozenset())
    wanted = {"max_new_tokens": TOKENS, "stop_ids": frozenset(), "draft_ids": mine.ids}
    (theirs,) = house.expected([prompt], ["bot@3"], **wanted)
    difference = sum(theirs.draft_logprobs) - sum(mine.logprobs)
    assert found.tally.difference == pytest.approx(difference, abs=1e-3) and difference < -0.1
    assert found.tally.same_first == (mine.ids[0] == theirs.ids[0])
    assert found.tally.same_whole == (mine.ids == theirs.ids) == 0


def test_a_shadow_is_asked_with_its_own_template(house: House, running: Running) -> None:
    house.registry.set_alias("bot@dressed", {1: 1.0}, shadow=4)
    asked: Any = [{"role": "user", "content": "the lake"}]
    body = {"model": "bot@dressed", "messages": asked, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    assert running.ask("/v1/chat/completions", body)[0] == 200
    found = settled(running, "bot@dressed", 1)
    prompt = house.renderer.prompt(asked)
    (mine,) = house.expected([prompt], ["bot@1"], max_new_tokens=TOKENS, stop_ids=frozenset())
    wanted = {"max_new_tokens": TOKENS, "stop_ids": frozenset(), "draft_ids": mine.ids}
    (theirs,) = house.expected([house.renderer.with_template(OWN).prompt(asked)], ["bot@4"], **wanted)
    assert found.tally.difference == pytest.approx(sum(theirs.draft_logprobs) - sum(mine.logprobs), abs=1e-3)


def test_a_shadow_that_cannot_be_asked_is_counted_and_nothing_else(house: House, running: Running) -> None:
    house.registry.set_alias("bot@broken", {1: 1.0}, shadow=5)
    assert ask(running, "bot@broken")["model"] == "bot@1"
    connection, stream = running.start_stream(model="bot@broken", max_tokens=20)
    assert {chunk["model"] for chunk in read_stream(stream)} == {"bot@1"}
    connection.close()
    found = settled(running, "bot@broken", 2)
    assert (found.tally.failed, found.tally.answered, found.logprob_difference) == (2, 0, None)
    metrics = running.ask("/metrics")[1]
    assert 'tenon_shadow_requests_total{alias="bot@broken",outcome="failed",version="5"} 2.0' in metrics
    assert 'outcome="failed",version="1"' not in metrics, "the alias itself is fine"


def test_a_shadow_leaves_its_place_to_whoever_needs_it(house: House) -> None:
    """One place: a shadow waits until nobody is there, and goes when somebody comes."""
    house.registry.set_alias("bot@busy", {1: 1.0}, shadow=3)
    with serving(house, rows=1, slots=4) as running:
        ask(running, "bot@busy", max_tokens=2)
        assert settled(running, "bot@busy", 1).tally.answered == 1
        ask(running, "bot@busy", max_tokens=230)
        wait_until(lambda: running.server.engine.load.running == 1)
        connection, stream = running.start_stream(model="bot@1")
        read_stream(stream)
        connection.close()
        found = settled(running, "bot@busy", 2)
        assert (found.tally.answered, found.tally.dropped) == (1, 1)


def test_a_shadow_needs_a_slot_that_nobody_has(house: House) -> None:
    house.registry.set_alias("bot@full", {1: 1.0}, shadow=3)
    with serving(house, slots=1) as running:
        ask(running, "bot@full")
        found = settled(running, "bot@full", 1)
        assert found.tally.dropped == 1 and running.server.engine.loads == 1


def test_a_shadow_is_not_paid_for(house: House) -> None:
    store = KeyStore(house.world.root / "keys.json")
    book = UsageBook(house.world.root / "usage.db")
    house.registry.set_alias("bot@paid", {1: 1.0}, shadow=3)
    secret, key = store.create("acme")
    with serving(house, slots=4, access=Access(store, book)) as running:
        connection = running.connect()
        body = '{"model": "bot@paid", "prompt": "the lake", "max_tokens": 12, "ignore_eos": true}'
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {secret}"}
        connection.request("POST", "/v1/completions", body, headers)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        answer.read()
        connection.close()
        assert settled(running, "bot@paid", 1).tally.answered == 1
        prompt = len(house.renderer.tokenizer.encode("the lake"))
        wait_until(lambda: book.used(key.account).tokens == prompt + 12)
        metrics = running.ask("/metrics")[1]
        assert 'tenon_completion_tokens_total{model="bot@1"} 12.0' in metrics
        assert 'model="bot@3"' not in metrics
