"""Texts as vectors: those of transformers and PEFT, for the base and for adapters, however they are asked for."""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import openai
import pytest
import torch
from openai import OpenAI
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tenon.data.rows import Completion
from tenon.serve.front.access import Access
from tenon.tenants.keys import KeyStore
from tenon.tenants.usage import UsageBook
from tests.serve.house import CONTEXT, House, Running, read_stream, serving, wait_until

TEXTS = [
    "the house at the lake",
    "weather together",
    "home",
    "then and there, when others were home and the lake was low",
]


@torch.no_grad()
def by_transformers(house: House, name: str | None, ids: list[int], pooling: str) -> np.ndarray:
    """The vector that transformers' hidden states say, by PEFT where it is an adapter's."""
    model = AutoModelForCausalLM.from_pretrained(house.world.root / "base", dtype=torch.float32)
    if name is not None:
        model = PeftModel.from_pretrained(model, str(house.registry.folder(house.registry.get(name))))
    hidden_TD = model.eval()(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].double()
    vector_D = hidden_TD[-1] if pooling == "last" else hidden_TD.mean(dim=0)
    return (vector_D / vector_D.norm()).numpy()


def prompt_ids(house: House, text: str) -> list[int]:
    return house.renderer.prompt_of(Completion(text, "", "test"))


def float32(numbers: list[float]) -> np.ndarray:
    return np.array(numbers, dtype=np.float32)


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("model", ["base", "low", "high@1"])
def test_vectors_are_those_of_transformers_hidden_states(
    house: House, client: OpenAI, model: str, pooling: str
) -> None:
    found = client.embeddings.create(model=model, input=TEXTS, extra_body={"pooling": pooling})
    name = None if model == "base" else model
    tokens = 0
    for text, each in zip(TEXTS, found.data, strict=True):
        ids = prompt_ids(house, text)
        tokens += len(ids)
        assert np.abs(np.array(each.embedding) - by_transformers(house, name, ids, pooling)).max() < 1e-5
        assert np.linalg.norm(each.embedding) == pytest.approx(1, abs=1e-6)
    assert [each.index for each in found.data] == list(range(len(TEXTS)))
    assert (found.usage.prompt_tokens, found.usage.total_tokens) == (tokens, tokens)
    assert found.model == {"base": "tiny", "low": "low@1", "high@1": "high@1"}[model]


def test_texts_and_ids_numbers_and_base64_say_the_same(house: House, running: Running, client: OpenAI) -> None:
    ids = prompt_ids(house, TEXTS[0])
    forms: list[str | list[str] | list[int] | list[list[int]]] = [TEXTS[0], [TEXTS[0]], ids, [ids]]
    kinds: tuple[Literal["float", "base64"], ...] = ("float", "base64")
    told = [client.embeddings.create(model="low", input=form, encoding_format=kind) for form in forms for kind in kinds]
    for found in told[::2]:
        assert np.array_equal(float32(found.data[0].embedding), float32(told[0].data[0].embedding))
    for found in told[1::2]:
        text = found.data[0].embedding
        assert isinstance(text, str)
        assert np.array_equal(np.frombuffer(base64.b64decode(text), "<f4"), float32(told[0].data[0].embedding))
    default = client.embeddings.create(model="low", input=ids)  # the client asks for base64, and decodes it
    assert np.array_equal(float32(default.data[0].embedding), float32(told[0].data[0].embedding))
    status, body = running.ask("/v1/embeddings", {"model": "low", "input": "x", "dimensions": house.base.facts.hidden})
    assert status == 200 and len(body["data"][0]["embedding"]) == house.base.facts.hidden


def test_more_inputs_than_sequences_may_be_open_come_in_order(house: House) -> None:
    ids = [[5 + i % 200, 7, 9 + i % 100] for i in range(60)]
    with serving(house, rows=4, queue=2) as running, OpenAI(base_url=running.url, api_key="x", max_retries=0) as client:
        found = client.embeddings.create(model="low", input=ids)
        for i in (0, 7, 59):
            alone = client.embeddings.create(model="low", input=ids[i])
            assert np.abs(np.array(found.data[i].embedding) - np.array(alone.data[0].embedding)).max() < 1e-5
        assert found.usage.prompt_tokens == 180
        wait_until(lambda: running.server.gate.open == 0 and running.server.engine.load.running == 0)


def test_answers_that_stream_go_on_beside_many_vectors(house: House, running: Running, client: OpenAI) -> None:
    alone = client.completions.create(model="low", prompt="the lake", temperature=0, max_tokens=200)
    connection, stream = running.start_stream(model="low", temperature=0, max_tokens=200, ignore_eos=False)
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(client.embeddings.create, model=name, input=TEXTS * 5) for name in ("low", "high", "base")]
        found = [each.result() for each in asked]
    assert all(len(each.data) == 20 for each in found)
    said = "".join(choice["text"] for chunk in read_stream(stream) for choice in chunk["choices"])
    assert alone.choices[0].text.endswith(said) and len(said) > 0
    connection.close()


def test_a_client_that_goes_away_leaves_nothing_to_read(running: Running) -> None:
    connection = running.connect()
    body = json.dumps({"model": "low", "input": [[7] * 250] * 120}).encode()
    connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
    wait_until(lambda: running.server.engine.load.running > 0)
    connection.close()
    wait_until(lambda: running.server.gate.open == 0 and running.server.engine.load.running == 0, seconds=2)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": ""}, None),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input.0"),
        ({"input": ["the", ""]}, None),
        ({"input": [5, 288]}, "input"),
        ({"input": [5] * (CONTEXT + 1)}, "input"),
        ({"input": [[5]] * 2049}, "input"),
        ({"input": None}, "input"),
        ({"dimensions": 8}, "dimensions"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"pooling": "max"}, "pooling"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_what_cannot_be_a_vector_is_refused(running: Running, change: dict[str, object], param: str | None) -> None:
    status, body = running.ask("/v1/embeddings", {"model": "base", "input": "the", **change})
    assert status == 400 and body["error"]["param"] == param and body["error"]["message"], body


def test_the_longest_input_fills_the_context(client: OpenAI) -> None:
    assert client.embeddings.create(model="base", input=[5] * CONTEXT).usage.prompt_tokens == CONTEXT


def test_keys_have_rights_and_pay_for_inputs_alone(house: House, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("keys")
    store, book = KeyStore(folder / "keys.json"), UsageBook(folder / "usage.db")
    typed, key = store.create("acme", rights=("low",))
    with (
        serving(house, access=Access(store, book)) as running,
        OpenAI(base_url=running.url, api_key=typed, max_retries=0) as client,
    ):
        found = client.embeddings.create(model="low", input=TEXTS)
        wait_until(lambda: book.used(key.id).reserved_tokens == 0)
        assert book.used(key.id).tokens == found.usage.total_tokens
        for name, kind in (("base", openai.PermissionDeniedError), ("lo", openai.PermissionDeniedError)):
            with pytest.raises(kind):
                client.embeddings.create(model=name, input="x")
