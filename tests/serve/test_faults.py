"""What clients and files do wrong: told in OpenAI's shape, and nobody else notices."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import openai
import pytest
from openai import OpenAI
from safetensors.numpy import load_file, save_file

from tenon.errors import AdapterError
from tenon.serve.engine.adapter_files import AdapterReader
from tenon.serve.jobs import AdapterRef
from tests.serve.damages import DAMAGES, rehash
from tests.serve.house import CONTEXT, House, Running, read_stream, serving, wait_until

CHAT: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "the"}], "max_tokens": 2}
TEXT: dict[str, Any] = {"model": "base", "prompt": "the", "max_tokens": 2}


def test_unknown_names_and_paths_are_not_found(running: Running, client: OpenAI) -> None:
    names = ("lo", "low@9", "low@0", "low@x", "../x", "/etc/passwd", "low/1", "", "low@1/../1", "a" * 5000, "lo\u0000w")
    for name in names:
        with pytest.raises(openai.NotFoundError) as caught:
            client.completions.create(model=name, prompt="the", max_tokens=2)
        assert caught.value.code == "model_not_found" and caught.value.param == "model", name
    with pytest.raises(openai.NotFoundError, match="did you mean low"):
        client.chat.completions.create(model="lowe", messages=[{"role": "user", "content": "x"}])
    assert running.ask("/v1/nothing", TEXT)[0] == 404
    status, body = running.ask("/v1/completions")
    assert status == 405 and body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"stop": [""]}, "stop.0"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"surprise": 1}, "surprise"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"999999999": 1}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, None),
        ({"model": None}, "model"),
    ],
)
@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_bad_fields_are_named(running: Running, route: str, change: dict[str, Any], param: str | None) -> None:
    status, body = running.ask(f"/v1/{route}", {**(CHAT if "chat" in route else TEXT), **change})
    assert status == 400, body
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["param"] == param and body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "change",
    [
        {"messages": []},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"messages": "hello"},
        {"tools": [{"type": "function", "function": {"name": "x y"}}]},
        {"tool_choice": "required"},
        {"response_format": {"type": "json"}},
        {"top_logprobs": 2},
    ],
)
def test_bad_chats_are_refused(running: Running, change: dict[str, Any]) -> None:
    status, body = running.ask("/v1/chat/completions", {**CHAT, **change})
    assert status == 400 and body["error"]["message"], body


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": []},
        {"prompt": ""},
        {"prompt": [[]]},
        {"prompt": [1, "x"]},
        {"prompt": [5, 288]},
        {"prompt": [-1]},
        {"prompt": [2**70]},
        {"prompt": [True]},
        {"prompt": "\ud800"},
        {"max_tokens": 0},
        {"echo": True, "logprobs": 1, "stream": True},
        {"logprobs": 21},
    ],
)
def test_bad_completions_are_refused(running: Running, change: dict[str, Any]) -> None:
    status, body = running.ask("/v1/completions", {**TEXT, **change})
    assert status == 400 and body["error"]["message"], body


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"model": "base", "prompt": "\xff"}', b"[" * 50_000,
     b'{"model": "base", "prompt": [' + b"9" * 9000 + b"]}", b'{"\\ud800": 1}', b'{"temperature": NaN}'],
)  # fmt: skip
def test_bodies_that_are_no_request_are_refused(running: Running, data: bytes) -> None:
    status, body = running.ask("/v1/completions", data)
    assert status == 400 and body["error"]["message"], body


def test_a_prompt_that_leaves_no_room_says_the_numbers(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=f"context is {CONTEXT} tokens") as caught:
        client.completions.create(model="base", prompt=[5] * CONTEXT, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="lower max_tokens"):
        client.completions.create(model="base", prompt=[5] * 10, max_tokens=CONTEXT - 9)
    found = client.completions.create(model="base", prompt=[5] * (CONTEXT - 1), max_tokens=1)
    assert found.usage is not None and found.usage.prompt_tokens == CONTEXT - 1


def test_large_bodies_are_refused_at_the_latest_when_they_become_too_large(running: Running) -> None:
    status, body = running.ask("/v1/completions", {**TEXT, "prompt": "x" * 10_000_000})
    assert status == 413 and body["error"]["type"] == "request_too_large"
    connection = running.connect()
    chunks = (b'{"prompt": "' if i == 0 else b"x" * 1000 for i in range(200))
    connection.request("POST", "/v1/completions", chunks, {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_bad_adapter_is_refused_and_other_streams_go_on(
    house: House, running: Running, client: OpenAI, kind: str
) -> None:
    DAMAGES[kind](house.registry.folder(house.register(f"bad-{kind}", rank=2, seed=100 + list(DAMAGES).index(kind))))
    whole = client.completions.create(model="low", temperature=0, prompt="the lake", max_tokens=200).choices[0].text
    connection, stream = running.start_stream(model="low", temperature=0, max_tokens=200, ignore_eos=False)
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.completions.create(model=f"bad-{kind}", prompt="the", max_tokens=2)
    assert caught.value.code is not None and caught.value.code.startswith("adapter-")
    assert str(house.world.root) not in caught.value.message
    said = "".join(choice["text"] for chunk in read_stream(stream) for choice in chunk["choices"])
    assert whole.endswith(said) and len(said) >= len(whole) - 10
    connection.close()


def test_a_version_whose_folder_is_a_link_is_not_there(house: House, client: OpenAI) -> None:
    folder = house.registry.folder(house.register("elsewhere", rank=2, seed=90))
    shutil.move(folder, house.world.root / "moved")
    folder.symlink_to(house.world.root / "moved")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="elsewhere", prompt="the", max_tokens=2)


def test_an_adapter_whose_files_vanish_while_it_is_loaded_goes_on_answering(house: House) -> None:
    """It is in a slot; that it is gone is told to whoever asks for it anew."""
    entry = house.register("vanishing", rank=2, seed=91)
    with serving(house) as running:
        connection, stream = running.start_stream(model="vanishing", temperature=0)
        shutil.rmtree(house.registry.folder(entry))
        chunks = read_stream(stream)
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        connection.close()
        assert running.ask("/v1/completions", {**TEXT, "model": "vanishing@1"})[0] == 404


def test_files_that_vanish_between_being_looked_up_and_being_read_are_told(house: House) -> None:
    """What reads them, as it is called by the engine's reader thread."""
    entry = house.register("late", rank=2, seed=92)
    reader = AdapterReader(house.registry)
    found = house.registry.get("late")
    shutil.rmtree(house.registry.folder(entry))
    with pytest.raises(AdapterError) as caught:
        reader(AdapterRef(found.adapter_hash, found.label))
    assert caught.value.code in ("adapter-unknown", "adapter-damaged")


def test_adapters_of_another_base_or_template_are_refused(house: House, client: OpenAI) -> None:
    house.register("stranger", rank=2, seed=50, base_hash="0" * 64)
    house.register("dressed", rank=2, seed=51, template_hash="e" * 64)
    for name, code in (("stranger", "adapter-other-base"), ("dressed", "adapter-template")):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=name, prompt="the", max_tokens=2)
        assert caught.value.code == code
    assert "stranger" not in {model.id for model in client.models.list()}


def test_scores_that_are_not_finite_end_their_own_request(house: House, running: Running, client: OpenAI) -> None:
    """Weights may all be finite and what comes of them not."""
    entry = house.register("huge", rank=2, seed=60)
    weights = house.registry.folder(entry) / "adapter_model.safetensors"
    save_file({name: np.full_like(t, 3e38) for name, t in load_file(weights).items()}, weights)
    rehash(house.registry.folder(entry))
    connection, stream = running.start_stream(model="low")
    with pytest.raises(openai.UnprocessableEntityError, match="not finite"):
        client.completions.create(model="huge", prompt="the", max_tokens=2)
    read_stream(stream)
    connection.close()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(running: Running, stream: bool) -> None:
    engine, gate = running.server.engine, running.server.gate
    connection = running.connect()
    for _ in range(3):
        body = json.dumps({"model": "low", **LONG_MANY, "stream": stream}).encode()
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        wait_until(lambda: engine.load.running == 3)
        if stream:
            assert connection.getresponse().readline()
        connection.close()
        wait_until(lambda: engine.load.running == 0 and gate.open == 0, seconds=2)


# Far more than can be made in the time that the test waits.
LONG_MANY = {"prompt": ["the lake"] * 3, "n": 1, "max_tokens": CONTEXT - 20, "ignore_eos": True}


def test_too_many_sequences_are_told_to_come_back(house: House) -> None:
    with serving(house, rows=1, queue=1) as running:
        status, body = running.ask("/v1/completions", {**TEXT, "n": 3})
        assert status == 400 and "2 sequences" in body["error"]["message"]
        held = [running.start_stream()]
        connection = running.connect()
        connection.request("POST", "/v1/completions", json.dumps(TEXT).encode(), {"Content-Type": "application/json"})
        wait_until(lambda: running.server.gate.open == 2)
        with (
            OpenAI(base_url=running.url, api_key="none", max_retries=0) as client,
            pytest.raises(openai.RateLimitError) as caught,
        ):
            client.completions.create(**TEXT)
        assert caught.value.code == "queue_full" and caught.value.response.headers["Retry-After"] == "1"
        assert connection.getresponse().status == 200
        read_stream(held[0][1])
        for each in (connection, held[0][0]):
            each.close()


def test_a_server_that_drains_finishes_what_runs_and_takes_nothing_new(house: House) -> None:
    with serving(house) as running:
        connection, stream = running.start_stream()
        idle = running.connect()
        idle.request("GET", "/ready")
        assert idle.getresponse().read() == b'{"status":"ready"}'
        running.server.drain()
        idle.request("POST", "/v1/completions", json.dumps(TEXT).encode(), {"Content-Type": "application/json"})
        answer = idle.getresponse()
        assert answer.status == 503 and json.loads(answer.read())["error"]["code"] == "draining"
        assert running.ask("/ready")[0] == 503 and running.ask("/health")[0] == 200
        chunks = read_stream(stream)
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        for each in (connection, idle):
            each.close()


def test_what_takes_too_long_is_ended_with_an_error(house: House) -> None:
    with serving(house, drain_seconds=0.0) as running:
        connection, stream = running.start_stream(n=4)
        running.server.drain()
        last = [line for line in stream.read().decode().splitlines() if line.startswith("data: ")][-1]
        assert json.loads(last[6:])["error"]["code"] == "run-stopped"
        connection.close()


def test_a_full_cache_makes_sequences_wait_and_changes_no_answer(house: House) -> None:
    one = house.base.facts.layers * 2 * CONTEXT * house.base.facts.kv_heads * house.base.facts.head_dim * 4
    with (
        serving(house, cache_bytes=one * 3 // 2, rows=4) as running,
        OpenAI(base_url=running.url, api_key="none", max_retries=0, timeout=60) as client,
    ):
        fields: dict[str, Any] = {
            "model": "low",
            "temperature": 0,
            "max_tokens": 150,
            "extra_body": {"ignore_eos": True},
        }
        prompts = ["the lake", "weather", "home", "then and there"]
        alone = [client.completions.create(**fields, prompt=prompt).choices[0].text for prompt in prompts]
        together = client.completions.create(**fields, prompt=prompts)
        assert [choice.text for choice in together.choices] == alone
        assert running.server.engine.load.preemptions > 0
