"""Aliases while a server runs: flips, rollbacks, guards, canaries; whoever has begun ends where he began."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tenon.registry.aliases import Guard
from tenon.serve.front.names import Asker, Names
from tests.serve.house import House, Running, make_house, read_stream, serving, wait_until


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    """`bot` in three versions."""
    made = make_house(tmp_path_factory.mktemp("life"))
    for seed in (10, 11, 12):
        made.register("bot", rank=3, seed=seed)
    return made


@pytest.fixture(scope="module")
def running(house: House) -> Iterator[Running]:
    with serving(house, slots=4) as started:
        yield started


def ask(running: Running, model: str, **fields: Any) -> tuple[int, Any]:
    body = {"model": model, "prompt": "the lake", "max_tokens": 4, "temperature": 0, "ignore_eos": True, **fields}
    return running.ask("/v1/completions", body)


def answering(running: Running, model: str, **fields: Any) -> str:
    status, answer = ask(running, model, **fields)
    assert status == 200, answer
    return answer["model"]


def damage(house: House, version: int) -> None:
    weights = house.registry.folder(house.registry.get(f"bot@{version}")) / "adapter_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)


def test_p34_a_request_ends_on_the_version_that_it_began_with(house: House, running: Running) -> None:
    """While its alias flips, and while its version is removed altogether."""
    leaving = house.register("passing", rank=3, seed=20)
    house.register("passing", rank=3, seed=21)
    house.registry.set_alias("passing@prod", {1: 1.0})
    ids = house.renderer.tokenizer.encode("the lake")
    (wanted,) = house.expected([ids], ["passing@1"], max_new_tokens=120, stop_ids=frozenset())
    connection, stream = running.start_stream(model="passing@prod", temperature=0, max_tokens=120)
    house.registry.set_alias("passing@prod", {2: 1.0})
    house.registry.remove("passing@1")
    assert not house.registry.folder(leaving).exists()
    assert answering(running, "passing@prod") == "passing@2", "the next request goes elsewhere"
    chunks = read_stream(stream)
    connection.close()
    assert {chunk["model"] for chunk in chunks} == {"passing@1"}
    said = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    assert house.decode(wanted.ids).endswith(said) and len(said) > 50
    assert ask(running, "passing@1")[0] == 404


def test_a_rollback_takes_hold_with_the_next_request(house: House, running: Running) -> None:
    house.registry.set_alias("bot@fast", {1: 1.0})
    for version in (2, 3):
        house.registry.set_alias("bot@fast", {version: 1.0})
        assert answering(running, "bot@fast") == f"bot@{version}"
    began = time.monotonic()
    house.registry.roll_back("bot@fast")
    assert answering(running, "bot@fast") == "bot@2"
    assert time.monotonic() - began < 1.0


def test_a_canary_gets_its_share(house: House) -> None:
    house.registry.set_alias("bot@canary", {1: 90.0, 2: 10.0})
    draw = random.Random(3).random
    names = Names(house.registry, house.renderer, base="tiny", base_hash=house.base.base_hash, draw=draw)
    dealt = Counter(names.deal("bot@canary").version for _ in range(2000))  # type: ignore[union-attr]
    assert abs(dealt[2] - 200) < 3 * (2000 * 0.1 * 0.9) ** 0.5, "within three standard deviations"
    assert names.deal("bot@1") is None and names.deal("tiny") is None and names.deal("bot@nothing") is None


def test_a_user_is_dealt_the_same_version_every_time(house: House, running: Running) -> None:
    house.registry.set_alias("bot@users", {1: 50.0, 2: 50.0})
    users = [f"user-{number}" for number in range(12)]
    first = [answering(running, "bot@users", user=user) for user in users]
    assert set(first) == {"bot@1", "bot@2"}
    assert [answering(running, "bot@users", user=user) for user in users] == first
    house.registry.set_alias("bot@users", {1: 20.0, 2: 80.0})
    after = [answering(running, "bot@users", user=user) for user in users]
    assert all(new == "bot@2" for old, new in zip(first, after, strict=True) if old == "bot@2"), "none goes back"
    assert {answering(running, "bot@users") for _ in range(30)} == {"bot@1", "bot@2"}, "without a user each is dealt"


def test_a_sticky_alias_deals_a_tenant_once(house: House) -> None:
    names = Names(house.registry, house.renderer, base="tiny", base_hash=house.base.base_hash)

    def versions(tenant: str, user: str | None = None) -> set[int]:
        found = (names.deal("bot@tenants", Asker(tenant, user)) for _ in range(20))
        return {dealt.version for dealt in found if dealt is not None}

    house.registry.set_alias("bot@tenants", {1: 50.0, 2: 50.0}, sticky=True)
    assert all(len(versions(f"tenant-{number}")) == 1 for number in range(20))
    assert {version for number in range(20) for version in versions(f"tenant-{number}")} == {1, 2}
    assert len(versions("")) == 2, "nobody in particular"
    house.registry.set_alias("bot@tenants", {1: 50.0, 2: 50.0})
    assert len(versions("tenant-1")) == 2 and len(versions("tenant-1", "kim")) == 1


def test_a_version_that_fails_is_rolled_back_by_its_guard(house: House) -> None:
    house.register("bot", rank=3, seed=13)
    damage(house, 4)
    registry, said = house.registry, []
    registry.set_alias("bot@prod", {1: 1.0})
    registry.guard_alias("bot@prod", Guard(errors=0.5, requests=4))
    with serving(house, slots=4, say=said.append) as running:
        assert [ask(running, "bot@4")[0] for _ in range(6)] == [422] * 6, "asked by its number it fails for itself"
        registry.set_alias("bot@prod", {4: 1.0})
        for _ in range(3):
            assert ask(running, "bot@prod")[1]["error"]["code"] == "adapter-damaged"
        for _ in range(4):  # these are the client's, and count for nothing
            assert ask(running, "bot@prod", prompt="the lake " * 400)[0] == 400
        assert registry.target("bot@prod").shares == {4: 1.0}
        assert ask(running, "bot@prod")[0] == 422
        wait_until(lambda: registry.target("bot@prod").shares == {1: 1.0})
        assert answering(running, "bot@prod") == "bot@1"
        metrics = running.ask("/metrics")[1]
    back = registry.aliases("bot")["prod"].rolled_back
    assert back is not None and back.left.shares == {4: 1.0}
    assert back.reason == "4 of 4 requests to version 4 failed, the last with adapter-damaged"
    assert said == [f"bot@prod was rolled back from 4 to 1: {back.reason}"]
    assert 'tenon_alias_requests_total{alias="bot@prod",outcome="failed",version="4"} 4.0' in metrics
    assert 'tenon_alias_requests_total{alias="bot@prod",outcome="answered",version="1"} 1.0' in metrics
    assert 'tenon_alias_rollbacks_total{alias="bot@prod"} 1.0' in metrics


def test_a_few_failures_among_many_answers_are_borne(house: House, running: Running) -> None:
    """A canary: its own requests are counted, not those of the version beside it."""
    registry = house.registry
    registry.set_alias("bot@some", {1: 1.0})
    registry.guard_alias("bot@some", Guard(errors=0.25, requests=4))
    registry.set_alias("bot@some", {2: 1.0})
    folder, aside = registry.folder(registry.get("bot@2")), house.world.root / "aside"
    for _ in range(6):
        assert answering(running, "bot@some") == "bot@2"
    folder.rename(aside)
    assert [ask(running, "bot@some")[1]["error"]["code"] for _ in range(2)] == ["model_not_found"] * 2
    aside.rename(folder)
    assert answering(running, "bot@some") == "bot@2", "2 of 8 is what the guard allows"
    folder.rename(aside)
    assert [ask(running, "bot@some")[0] for _ in range(2)] == [404, 200], "3 of 10 is not"
    aside.rename(folder)
    assert answering(running, "bot@some") == "bot@1"


def test_several_servers_roll_back_once(house: House) -> None:
    registry = house.registry
    house.register("bot", rank=3, seed=14)
    damage(house, 5)
    registry.set_alias("bot@shared", {1: 1.0})
    registry.set_alias("bot@shared", {3: 1.0})
    registry.guard_alias("bot@shared", Guard(errors=0.0, requests=3))
    registry.set_alias("bot@shared", {5: 1.0})
    with serving(house) as one, serving(house) as other, ThreadPoolExecutor(6) as several:
        found = list(several.map(lambda turn: ask((one, other)[turn % 2], "bot@shared")[0], range(12)))
        assert found.count(422) >= 3
        wait_until(lambda: registry.target("bot@shared").shares == {3: 1.0})
        time.sleep(0.2)
        assert [answering(each, "bot@shared") for each in (one, other)] == ["bot@3"] * 2
    alias = registry.aliases("bot")["shared"]
    assert [target.shares for target in alias.before] == [{5: 1.0}, {3: 1.0}, {1: 1.0}], "one step, and no further"
