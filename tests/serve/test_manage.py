"""The management API: a port and keys of its own, and what can be done there."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

import pytest

from tenon.registry.store import Registry
from tenon.serve.front.access import Access
from tenon.serve.run import Managing, address, listen
from tenon.tenants.keys import KeyStore
from tenon.tenants.usage import UsageBook, UsageReader
from tests.serve.house import House, Running, read_stream, serving, wait_until


@dataclass(frozen=True, slots=True)
class Managed:
    """A server that is managed."""

    running: Running
    registry: Registry
    store: KeyStore
    book: UsageBook
    port: int
    key: str

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        sent = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, None if body is None else json.dumps(body).encode(), sent)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        found = json.loads(text) if text else None
        return answer.status, found, {name.lower(): value for name, value in answer.getheaders()}

    def get(self, path: str) -> Any:
        status, found, _ = self.ask("GET", path)
        assert status == 200, found
        return found


@contextmanager
def managed(house: House, home: Any, **changes: Any) -> Iterator[Managed]:
    store, path = KeyStore(home / "keys.json"), home / "usage.db"
    book, registry = UsageBook(path), Registry(house.world.settings.registry)
    typed, _ = store.create("ops", purpose="management")
    with listen("127.0.0.1", 0) as listening:
        port = int(address(listening).rpartition(":")[2])
        managing = Managing(listening, registry, store, UsageReader(path))
        with serving(house, access=Access(store, book), managing=managing, **changes) as running:
            yield Managed(running, registry, store, book, port, typed)


@pytest.fixture(scope="module")
def manage(house: House, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Managed]:
    with managed(house, tmp_path_factory.mktemp("managed")) as found:
        yield found


def test_only_a_management_key_opens_it_and_opens_nothing_else(manage: Managed) -> None:
    public, _ = manage.store.create("acme")
    paths = list(manage.ask("GET", "/openapi.json")[1]["paths"])
    assert len(paths) >= 12
    for key in (public, "", "tn-", manage.key[:-1], f"{manage.key}x"):
        for path in paths:
            path = path.replace("{name}", "low").replace("{label}", "low@1").replace("{alias}", "low@prod")
            for method in ("GET", "POST", "PUT", "DELETE"):
                status, found, _ = manage.ask(method, path.replace("{number}", "x"), {}, Authorization=f"Bearer {key}")
                assert status in (401, 405), (method, path, found)
    for headers in ({"Authorization": ""}, {"Authorization": f"Basic {manage.key}"}, {"Authorization": manage.key}):
        assert manage.ask("GET", "/v1/server", **headers)[0] == 401
    connection = manage.running.connect()
    connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {manage.key}"})
    assert connection.getresponse().status == 401
    connection.close()
    # Nothing of the one is on the other's port.
    assert manage.ask("GET", "/v1/models")[0] == 404
    assert manage.running.ask("/v1/server")[0] == manage.running.ask("/v1/keys")[0] == 404


def test_a_version_is_brought_into_memory_before_somebody_asks_it(house: House, manage: Managed) -> None:
    def state(name: str) -> str:
        return manage.get(f"/v1/adapters/{name}")["versions"][0]["state"]

    assert state("high") == "on disk"
    status, found, _ = manage.ask("POST", "/v1/adapters/high@1/load")
    assert status == 200 and found["state"] == "resident" == state("high") and found["rank"] == 7
    assert {each["name"] for each in manage.get("/v1/adapters")} >= {"low", "high"}
    assert manage.ask("POST", "/v1/adapters/high@1/unload")[0] == 202
    wait_until(lambda: state("high") == "on disk")
    assert manage.ask("POST", "/v1/adapters/high@1/load")[1]["state"] == "resident", (
        "it comes back when it is asked for"
    )
    for name, expected in (("nobody", 404), ("nobody@1", 404), ("..%2f..%2fx", 404), ("low@9", 404)):
        for verb in ("load", "unload"):
            assert manage.ask("POST", f"/v1/adapters/{name}/{verb}")[0] == expected, name
        assert manage.ask("GET", f"/v1/adapters/{name}")[0] == expected, name
    entry = house.register("broken", rank=2, seed=80)
    weights = house.registry.folder(entry) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    status, found, _ = manage.ask("POST", "/v1/adapters/broken@1/load")
    assert status == 422 and str(house.registry.root) not in json.dumps(found)


def test_an_alias_is_moved_rolled_back_and_forgotten(house: House, manage: Managed) -> None:
    for seed in (81, 82):
        house.register("bot", rank=2, seed=seed)
    path = "/v1/aliases/bot@prod"
    assert manage.ask("GET", path)[0] == 404
    status, made, headers = manage.ask("PUT", path, {"shares": {"1": 1}}, If_None_Match="*")
    assert status == 200 and made["target"]["shares"] == {"1": 1.0} and headers["etag"] == f'"{made["tag"]}"'
    assert manage.ask("PUT", path, {"shares": {"2": 1}}, If_None_Match="*")[0] == 412
    status, moved, _ = manage.ask("PUT", path, {"shares": {"1": 95, "2": 5}}, If_Match=headers["etag"])
    assert status == 200 and moved["target"]["shares"] == {"1": 0.95, "2": 0.05} and len(moved["before"]) == 1
    status, found, _ = manage.ask("PUT", path, {"shares": {"2": 1}}, If_Match=headers["etag"])
    assert status == 412 and found["error"]["code"] == "adapter-alias-moved"
    assert manage.ask("DELETE", path, If_Match=headers["etag"])[0] == 412
    assert manage.ask("POST", f"{path}/rollback", If_Match=headers["etag"])[0] == 412
    status, back, _ = manage.ask("POST", f"{path}/rollback", If_Match=f'"{moved["tag"]}"')
    assert status == 200 and back["target"]["shares"] == {"1": 1.0} and back["rolled_back"] == "asked for"
    assert back == manage.get(path) and back in manage.get("/v1/aliases")
    assert manage.registry.target("bot@prod").main == 1
    assert manage.get("/v1/adapters/bot")["aliases"] == {"prod": "1"}
    assert manage.ask("DELETE", path)[0] == 204 and manage.ask("DELETE", path)[0] == 404


def test_of_two_who_change_an_alias_at_once_one_does(house: House, manage: Managed) -> None:
    house.register("race", rank=2, seed=83)
    house.register("race", rank=2, seed=84)
    _, made, _ = manage.ask("PUT", "/v1/aliases/race@prod", {"shares": {"1": 1}})
    for _ in range(5):
        told: list[int] = []

        def change(version: int, tag: str = made["tag"], told: list[int] = told) -> None:
            told.append(manage.ask("PUT", "/v1/aliases/race@prod", {"shares": {str(version): 1}}, If_Match=tag)[0])

        threads = [threading.Thread(target=change, args=(version,)) for version in (1, 2, 1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(told) == [200, 412, 412, 412]
        made = manage.get("/v1/aliases/race@prod")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/v1/aliases/low@prod", {"shares": {}}),
        ("PUT", "/v1/aliases/low@prod", {"shares": {"x": 1}}),
        ("PUT", "/v1/aliases/low@prod", {"shares": {"1": 0}}),
        ("PUT", "/v1/aliases/low@prod", {"shares": {"1": 1}, "surprise": 1}),
        ("PUT", "/v1/aliases/low@3", {"shares": {"1": 1}}),
        ("PUT", "/v1/aliases/low", {"shares": {"1": 1}}),
        ("POST", "/v1/keys", {"tenant": "../x"}),
        ("POST", "/v1/keys", {"tenant": "x", "rights": ["a b"]}),
        ("POST", "/v1/keys", {"tenant": "x", "tokens_per_month": 0}),
        ("POST", "/v1/keys", {"tenant": "x", "lasts_seconds": 1e300}),
        ("POST", "/v1/keys", {"tenant": "x", "purpose": "management"}),
    ],
)
def test_what_makes_no_sense_is_refused(manage: Managed, method: str, path: str, body: Any) -> None:
    status, found, _ = manage.ask(method, path, body)
    assert status == 400 and found["error"]["message"], found


def test_keys_are_made_rotated_revoked_and_their_usage_told(manage: Managed) -> None:
    wanted = {"tenant": "zeta", "rights": ["low"], "tokens_per_month": 1000, "lasts_seconds": 3600}
    status, made, _ = manage.ask("POST", "/v1/keys", wanted)
    assert status == 201 and made["rights"] == ["low"] and made["expires"] == pytest.approx(time.time() + 3600, abs=60)
    assert manage.store.find(made["key"]).limits.tokens_per_month == 1000
    connection = manage.running.connect()
    body = json.dumps({"model": "low", "prompt": "the", "max_tokens": 3, "ignore_eos": True}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {made['key']}"}
    connection.request("POST", "/v1/completions", body, headers)
    used = json.loads(connection.getresponse().read())["usage"]["total_tokens"]
    connection.close()
    wait_until(lambda: manage.book.used(made["account"]).tokens == used)
    (row,) = [key for key in manage.get("/v1/keys") if key["id"] == made["id"]]
    assert (row["tokens"], row["requests"], row["reserved_tokens"]) == (used, 1, 0) and row["last_used"]
    assert "key" not in row and "digest" not in row
    status, heir, _ = manage.ask("POST", f"/v1/keys/{made['id']}/rotate", {"grace_seconds": 60})
    assert status == 201 and heir["account"] == made["account"] and heir["tokens"] == used
    (month,) = manage.get(f"/v1/keys/{heir['id']}/usage")
    assert month["tokens"] == used and month["month"] == time.strftime("%Y-%m", time.gmtime())
    assert manage.ask("DELETE", f"/v1/keys/{made['id']}")[1]["revoked"] is True
    assert manage.ask("POST", f"/v1/keys/{made['id']}/rotate", {})[0] == 400
    assert manage.ask("DELETE", "/v1/keys/ffffffff")[0] == manage.ask("GET", "/v1/keys/x/usage")[0] == 404
    own = manage.store.find(manage.key, "management").id
    assert manage.ask("DELETE", f"/v1/keys/{own}")[0] == manage.ask("POST", f"/v1/keys/{own}/rotate", {})[0] == 403


def test_a_server_says_what_it_does_and_is_drained(house: House, tmp_path: Any) -> None:
    with managed(house, tmp_path) as manage:
        found = manage.get("/v1/server")
        assert found["state"] == "ready" and found["base"] == "tiny" and found["slots"] == 2 and found["open"] == 0
        connection, stream = manage.running.start_stream()
        assert manage.get("/v1/server")["open"] == 1
        assert manage.ask("POST", "/v1/server/drain")[0] == 202
        wait_until(lambda: manage.running.server.gate.draining)
        assert read_stream(stream)[-1]["choices"][0]["finish_reason"] == "length"
        connection.close()
        wait_until(lambda: not reachable(manage.port) and not reachable(manage.running.port))


def reachable(port: int) -> bool:
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) == 0
