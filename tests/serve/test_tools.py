"""Functions over HTTP: told to the model, enforced by grammars, read from answers, through OpenAI's clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI, pydantic_function_tool
from pydantic import BaseModel, Field

from tenon.data.render import Renderer
from tests.serve.house import House, Running, serving

HERMES = (
    "{% if tools %}{% for tool in tools %}{{ tool.function.name }} {% endfor %}<tool_call>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    HERMES.replace("<tool_call>\n", "[TOOL_CALLS] [")
    .replace("\n</tool_call>", "]")
    .replace("<tool_call>", "[TOOL_CALLS]")
)
LLAMA = HERMES.replace("<tool_call>\n", "").replace("\n</tool_call>", "").replace("<tool_call>", "<|python_tag|>")
TEMPLATES = {"hermes": HERMES, "mistral": MISTRAL, "llama": LLAMA}
ASKED: dict[str, Any] = {
    "model": "base",
    "messages": [{"role": "user", "content": "the lake"}],
    "max_tokens": 150,
    "temperature": 1.3,
}


class Weather(BaseModel):
    """What arguments are parsed into."""

    city: str = Field(max_length=8)
    days: int = Field(ge=1, le=7)


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "of a city",
        "parameters": {**Weather.model_json_schema(), "additionalProperties": False},
    },
}
ADD = {
    "type": "function",
    "function": {"name": "add", "parameters": {"properties": {"a": {"enum": [1, 2]}}, "additionalProperties": False}},
}
WEATHER: dict[str, Any] = {"type": "function", "function": {"name": "get_weather"}}


def with_template(house: House, template: str) -> House:
    return replace(house, renderer=Renderer(house.renderer.tokenizer, template))


@pytest.fixture(scope="module", params=list(TEMPLATES))
def running(request: pytest.FixtureRequest, house: House) -> Iterator[Running]:
    with serving(with_template(house, TEMPLATES[request.param])) as started:
        yield started


@pytest.fixture
def client(running: Running) -> Iterator[Any]:
    with OpenAI(base_url=running.url, api_key="none", max_retries=0, timeout=60) as opened:
        yield opened


def test_a_named_function_is_called_with_arguments_of_its_schema(client: Any) -> None:
    for seed in range(3):
        found = client.chat.completions.create(**ASKED, tools=[ADD, TOOL], tool_choice=WEATHER, seed=seed).choices[0]
        assert found.finish_reason == "tool_calls" and found.message.content is None
        (call,) = found.message.tool_calls
        assert call.type == "function" and call.id.startswith("call_") and call.function.name == "get_weather"
        Weather.model_validate_json(call.function.arguments)


def test_required_calls_some_of_the_functions_and_streams_say_the_same(client: Any) -> None:
    fields = {**ASKED, "tools": [ADD, TOOL], "tool_choice": "required", "seed": 4}
    whole = client.chat.completions.create(**fields, parallel_tool_calls=False).choices[0]
    (call,) = whole.message.tool_calls
    assert call.function.name in ("add", "get_weather") and isinstance(json.loads(call.function.arguments), dict)
    names, arguments, ids, finish, pieces = [], "", [], "", 0
    for chunk in client.chat.completions.create(**fields, parallel_tool_calls=False, stream=True):
        delta = chunk.choices[0].delta
        for part in delta.tool_calls or []:
            names += [part.function.name] if part.function.name else []
            ids += [part.id] if part.id else []
            arguments += part.function.arguments or ""
            pieces += 1
            assert part.index == 0
        finish = chunk.choices[0].finish_reason or finish
    assert (names, arguments, finish) == ([call.function.name], call.function.arguments, "tool_calls")
    assert len(ids) == 1 and pieces > 2


def test_pydantic_tools_are_parsed_and_the_streaming_helper_works(client: Any) -> None:
    fields = {
        **ASKED,
        "tools": [pydantic_function_tool(Weather, name="get_weather")],
        "tool_choice": "required",
        "seed": 1,
    }
    found = client.chat.completions.parse(**fields, parallel_tool_calls=False)
    (call,) = found.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)
    with client.chat.completions.stream(**fields, parallel_tool_calls=False) as stream:
        kinds = {event.type for event in stream}
        last = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.done" in kinds
    assert last.message.tool_calls[0].function.parsed_arguments == call.function.parsed_arguments


def test_the_asynchronous_client(running: Running) -> None:
    async def ask() -> Any:
        async with AsyncOpenAI(base_url=running.url, api_key="none", max_retries=0) as client:
            fields: Any = {**ASKED, "tools": [TOOL], "tool_choice": WEATHER, "seed": 2}
            whole = await client.chat.completions.create(**fields)
            async with client.chat.completions.stream(**fields) as stream:
                async for _ in stream:
                    pass
                return whole, await stream.get_final_completion()

    whole, streamed = asyncio.run(ask())
    mine, theirs = (each.choices[0].message.tool_calls[0].function for each in (whole, streamed))
    assert (mine.name, mine.arguments) == (theirs.name, theirs.arguments)


def test_a_conversation_with_calls_goes_on_and_free_answers_are_text(client: Any) -> None:
    messages = [
        *ASKED["messages"],
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"days": 2}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    fields = {**ASKED, "messages": messages, "max_tokens": 8, "temperature": 0}
    auto = client.chat.completions.create(**fields, tools=[TOOL]).choices[0]
    assert auto.message.content and auto.message.tool_calls is None
    none = client.chat.completions.create(**fields, tools=[TOOL], tool_choice="none")
    without = client.chat.completions.create(**fields)
    assert none.choices[0].message == without.choices[0].message
    assert none.usage.prompt_tokens == without.usage.prompt_tokens


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "code_interpreter"}]}, None),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
        ({"tool_choice": "required"}, None),
        ({"tools": [TOOL], "ignore_eos": True}, None),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
                "tool_choice": "required",
            },
            "tools",
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}],
                "tool_choice": "required",
            },
            "tools",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, None),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "\ud800"}}]}]}, None),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"title": "\ud800"}}}]}, None),
    ],
)
def test_bad_tools_are_refused(running: Running, change: dict[str, Any], param: str | None) -> None:
    status, body = running.ask("/v1/chat/completions", {**ASKED, **change})
    assert status == 400 and body["error"]["message"], body
    assert param is None or body["error"]["param"] == param


def test_strict_functions_of_free_answers(house: House) -> None:
    """An answer that begins a call must go on as the schema says; what calls are told from has to be text."""
    tools = [{**TOOL, "function": {**TOOL["function"], "strict": True}}, ADD]
    with serving(with_template(house, HERMES)) as running, OpenAI(base_url=running.url, api_key="none") as opened:
        client: Any = opened
        found = client.chat.completions.create(**{**ASKED, "max_tokens": 30}, tools=tools, seed=1)
        assert found.choices[0].message.content
    with serving(with_template(house, MISTRAL)) as running, OpenAI(base_url=running.url, api_key="none") as opened:
        client = opened
        with pytest.raises(openai.BadRequestError, match="tool_choice required"):
            client.chat.completions.create(**ASKED, tools=tools)


def test_a_template_without_tools_or_with_unknown_calls_is_told(house: House) -> None:
    strange = HERMES.replace("<tool_call>", "<function=")
    for template, text in ((None, "writes no tools"), (strange, "not known")):
        changed = house if template is None else with_template(house, template)
        with serving(changed) as running, OpenAI(base_url=running.url, api_key="none", max_retries=0) as opened:
            client: Any = opened
            with pytest.raises(openai.BadRequestError, match=text) as caught:
                client.chat.completions.create(**ASKED, tools=[TOOL])
            assert caught.value.param == "tools"
