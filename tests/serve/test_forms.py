"""Answers in a form: JSON objects and schemas over HTTP, through OpenAI's client and its pydantic helpers."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from tests.serve.house import House, Running
from tests.serve.test_answers import HELLO

CHAT: dict[str, Any] = {"model": "low", "messages": HELLO, "max_tokens": 200}


class Place(BaseModel):
    """What answers are parsed into."""

    name: Literal["lake", "house"]
    rooms: int = Field(ge=1, le=9)
    open: bool | None


def schema_format(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}


def test_answers_are_parsed_into_pydantic_models(client: Any) -> None:
    for seed in range(5):
        found = client.chat.completions.parse(**CHAT, response_format=Place, seed=seed, temperature=1.5)
        assert found.choices[0].finish_reason == "stop"
        assert isinstance(found.choices[0].message.parsed, Place)


def test_streams_are_the_same_and_parsed_too(client: Any) -> None:
    fields = {**CHAT, "seed": 3, "temperature": 1.2}
    whole = client.chat.completions.parse(**fields, response_format=Place)
    with client.chat.completions.stream(**fields, response_format=Place) as stream:
        for _event in stream:
            pass
        last = stream.get_final_completion()
    assert last.choices[0].message.parsed == whole.choices[0].message.parsed
    assert last.choices[0].message.content == whole.choices[0].message.content


def test_many_held_and_free_answers_share_the_batch(client: Any) -> None:
    """With other schemas, adapters and temperatures beside them, each is what it is alone."""

    def ask(i: int) -> str:
        held = {"response_format": schema_format({"type": "array", "items": {"enum": [i, "x"]}, "maxItems": 3})}
        found = client.chat.completions.create(
            model=("low", "high", "base")[i % 3],
            messages=HELLO,
            max_tokens=40,
            seed=i,
            temperature=i % 2,
            **(held if i % 4 else {}),
        )
        return found.choices[0].message.content or ""

    alone = [ask(i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, range(8)))
    assert together == alone
    for i in (1, 2, 3, 5, 6, 7):
        assert isinstance(json.loads(alone[i]), list)


def test_a_json_object_is_any_object_and_length_is_told(client: Any) -> None:
    fields: dict[str, Any] = {**CHAT, "temperature": 1.5, "seed": 1, "response_format": {"type": "json_object"}}
    found = client.chat.completions.create(**fields).choices[0]
    assert found.message.content.startswith("{")
    assert found.finish_reason == "length" or isinstance(json.loads(found.message.content), dict)
    long = schema_format({"type": "string", "minLength": 500})
    cut = client.chat.completions.create(**{**fields, "max_tokens": 3, "response_format": long}).choices[0]
    assert cut.finish_reason == "length" and cut.message.content.startswith('"')
    fields["max_tokens"], fields["temperature"] = 3, 0
    text = client.chat.completions.create(**{**fields, "response_format": {"type": "text"}})
    plain = client.chat.completions.create(**{**CHAT, "max_tokens": 3, "temperature": 0})
    assert text.choices[0].message == plain.choices[0].message


def test_n_samples_of_one_schema(client: Any) -> None:
    found = client.chat.completions.create(
        **CHAT, n=4, seed=1, temperature=2, response_format=schema_format({"enum": ["a", "b", "c", "d"]}, strict=True)
    )
    said = {choice.message.content for choice in found.choices}
    assert said <= {'"a"', '"b"', '"c"', '"d"'} and len(said) > 1


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"not": {}}, "not"),
        ({"type": "string", "pattern": "("}, "regex"),
        ({"$ref": "http://127.0.0.1:1/x"}, "127.0.0.1"),
        ({"anyOf": [{}] * 2000}, "parts"),
        ({"enum": ["x" * 70_000]}, "characters"),
        ({"x-guidance": {"lenient": True}}, "x-guidance"),
    ],
)
def test_schemas_that_cannot_be_kept_are_refused_by_name(client: Any, schema: dict[str, Any], named: str) -> None:
    with pytest.raises(openai.BadRequestError, match=named) as caught:
        client.chat.completions.create(**CHAT, response_format=schema_format(schema))
    assert caught.value.code == "usage-grammar" and caught.value.param == "response_format"


@pytest.mark.parametrize(
    "form",
    [
        {"type": "xml"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": []}},
        {"type": "json_object", "surprise": 1},
        "json_object",
    ],
)
def test_forms_that_are_none_are_refused(running: Running, form: Any) -> None:
    status, body = running.ask("/v1/chat/completions", {**CHAT, "response_format": form})
    assert status == 400 and body["error"]["message"], body
    status, body = running.ask(
        "/v1/chat/completions", {**CHAT, "response_format": {"type": "json_object"}, "ignore_eos": True}
    )
    assert status == 400 and "ignore_eos" in body["error"]["message"]


def test_a_schema_that_takes_long_to_compile_stops_no_stream(house: House, running: Running, client: Any) -> None:
    """The largest that is read: other answers go on meanwhile, and health is told."""
    costly = {"anyOf": [{"properties": {f"p{i}": {"type": "string"}}} for i in range(450)]}
    connection, stream = running.start_stream(model="low", max_tokens=150)
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(running.ask, "/v1/chat/completions", {**CHAT, "response_format": schema_format(costly)})
        slowest = 0.0
        while not told.done():
            began = time.monotonic()
            assert running.ask("/health")[0] == 200
            slowest = max(slowest, time.monotonic() - began)
    # Whether it is compiled in the time that there is depends on the machine.
    assert told.result()[0] in (200, 400) and slowest < 5
    assert stream.read().endswith(b"data: [DONE]\n\n")
    connection.close()
