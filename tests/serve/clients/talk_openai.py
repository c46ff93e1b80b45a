"""What a program does with OpenAI's own client, in whichever version: python talk_openai.py URL KEY NARROW POOR

It imports nothing but that client, knows nothing special of the server, and says as JSON which version it was and what
it did. KEY may ask everything, NARROW `low` alone, POOR has no quota left.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import openai
from openai import AsyncOpenAI, OpenAI

HELLO: Any = [{"role": "user", "content": "the house"}]
# Of a tiny base that was never trained: some answer, always the same one.
FIELDS: Any = {"model": "low", "max_tokens": 12, "temperature": 0}


def expect(kind: type[Exception], act: Callable[[], object]) -> Any:
    """The error of this kind that the act must raise."""
    try:
        act()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was not raised")


def chats(client: OpenAI) -> None:
    """Whole answers and streams, usage, several choices, seeds, stop strings, log probabilities."""
    whole = client.chat.completions.create(messages=HELLO, **FIELDS)
    text = whole.choices[0].message.content
    assert text and whole.choices[0].message.role == "assistant" and whole.object == "chat.completion"
    assert whole.usage and whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    stream = client.chat.completions.create(
        messages=HELLO, stream=True, stream_options={"include_usage": True}, **FIELDS
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    finishes = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert finishes[-1] == whole.choices[0].finish_reason and not any(finishes[:-1])
    drawn: Any = {"messages": HELLO, "model": "high", "max_tokens": 10, "temperature": 1.2, "n": 3}
    first, second = (client.chat.completions.create(seed=7, **drawn) for _ in range(2))
    assert [c.message.content for c in first.choices] == [c.message.content for c in second.choices]
    assert [c.index for c in first.choices] == [0, 1, 2]
    stop = text[3:6]
    cut = client.chat.completions.create(messages=HELLO, stop=[stop], **FIELDS).choices[0]
    assert cut.message.content == text[: text.index(stop)] and cut.finish_reason == "stop"
    scored = client.chat.completions.create(messages=HELLO, logprobs=True, top_logprobs=2, **FIELDS)
    assert scored.choices[0].logprobs and scored.choices[0].logprobs.content
    for token in scored.choices[0].logprobs.content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 2


def texts(client: OpenAI) -> None:
    """Completions: several prompts, echo with the prompt's scores, streams."""
    found = client.completions.create(prompt=["the lake", "home"], echo=True, logprobs=1, **FIELDS)
    assert [choice.text.startswith(p) for choice, p in zip(found.choices, ("the lake", "home"), strict=True)] == [
        True,
        True,
    ]
    logprobs = found.choices[0].logprobs
    assert logprobs and logprobs.token_logprobs and logprobs.tokens
    assert logprobs.token_logprobs[0] is None and "".join(logprobs.tokens) == found.choices[0].text
    plain = client.completions.create(prompt="the lake", **FIELDS).choices[0].text
    stream = client.completions.create(prompt="the lake", stream=True, **FIELDS)
    assert "".join(choice.text for chunk in stream for choice in chunk.choices) == plain


def vectors(client: OpenAI) -> None:
    """Embeddings, by the client's own base64 and as numbers."""
    packed = client.embeddings.create(model="low", input=["the house", "the lake"])
    plain = client.embeddings.create(model="low", input=["the house", "the lake"], encoding_format="float")
    for one, other in zip(packed.data, plain.data, strict=True):
        assert max(abs(a - b) for a, b in zip(one.embedding, other.embedding, strict=True)) < 1e-6
        assert abs(math.fsum(x * x for x in one.embedding) - 1) < 1e-5
    assert packed.usage.total_tokens == plain.usage.total_tokens > 0


def schemas(client: OpenAI) -> None:
    """An answer that a JSON schema holds, whole and as a stream."""
    schema = {
        "type": "object",
        "properties": {"warm": {"type": "boolean"}},
        "required": ["warm"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "home", "schema": schema}}
    fields: Any = {"model": "low", "max_tokens": 100, "temperature": 0, "messages": HELLO, "response_format": form}
    said = client.chat.completions.create(**fields).choices[0]
    assert said.finish_reason == "stop" and said.message.content
    assert isinstance(json.loads(said.message.content)["warm"], bool)
    stream = client.chat.completions.create(stream=True, **fields)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == said.message.content


def models(client: OpenAI) -> None:
    """The list and one of it."""
    listed = {model.id: model for model in client.models.list()}
    assert {"tiny", "low", "low@1", "high"} <= listed.keys()
    assert client.models.retrieve("low@1").id == "low@1" and listed["low"].object == "model"


def errors(client: OpenAI, narrow: OpenAI, poor: OpenAI) -> None:
    """Each in the client's own type, with what it reads of the body."""
    ask = client.chat.completions.create
    bad = expect(openai.BadRequestError, lambda: ask(model="low", messages=HELLO, temperature=9))
    assert bad.status_code == 400 and bad.param == "temperature" and bad.type == "invalid_request_error"
    unknown = expect(openai.NotFoundError, lambda: ask(model="nobody", messages=HELLO))
    assert unknown.code == "model_not_found"
    expect(openai.NotFoundError, lambda: client.models.retrieve("nobody"))
    stranger = client.with_options(api_key="tn-00000000-wrong")
    key = expect(openai.AuthenticationError, lambda: stranger.models.list())
    assert key.code == "invalid_api_key"
    expect(openai.PermissionDeniedError, lambda: narrow.completions.create(model="high", prompt="x"))
    spent = expect(openai.RateLimitError, lambda: poor.completions.create(model="low", prompt="x"))
    assert spent.code == "insufficient_quota"
    large = expect(
        openai.APIStatusError, lambda: ask(model="low", messages=[{"role": "user", "content": "x" * 200_000}])
    )
    assert large.status_code == 413 and large.type == "request_too_large"
    assert large.request_id and large.body
    damaged = expect(openai.UnprocessableEntityError, lambda: ask(model="broken", messages=HELLO))
    assert damaged.code.startswith("adapter-")


def streams_that_are_closed(client: OpenAI) -> None:
    """Leaving a stream ends it; the next request goes on over the same client."""
    long: Any = {"model": "low", "prompt": "the", "max_tokens": 200, "stream": True, "extra_body": {"ignore_eos": True}}
    with client.completions.create(**long) as stream:
        next(iter(stream))
    stream = client.completions.create(**long)
    next(iter(stream))
    stream.close()
    assert client.completions.create(prompt="the", **FIELDS).choices


def raw(client: OpenAI) -> None:
    """Headers beside the parsed answer, and an answer that is read as it comes."""
    found = client.chat.completions.with_raw_response.create(messages=HELLO, **FIELDS)
    assert found.headers["content-type"] == "application/json" and found.parse().choices
    assert found.headers["x-request-id"]
    with client.chat.completions.with_streaming_response.create(messages=HELLO, stream=True, **FIELDS) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"


async def asynchronous(url: str, key: str) -> None:
    """Many at once, a stream, and a task that is cancelled in the middle of one."""
    async with AsyncOpenAI(base_url=url, api_key=key, max_retries=0) as client:
        many = await asyncio.gather(*(client.completions.create(prompt="the lake", **FIELDS) for _ in range(6)))
        assert len({found.choices[0].text for found in many}) == 1
        stream = await client.chat.completions.create(messages=HELLO, stream=True, **FIELDS)
        parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(parts)
        waiting = asyncio.ensure_future(
            client.completions.create(model="low", prompt="the", max_tokens=200, extra_body={"ignore_eos": True})
        )
        await asyncio.sleep(0.05)
        waiting.cancel()
        assert isinstance((await asyncio.gather(waiting, return_exceptions=True))[0], asyncio.CancelledError)


def main() -> None:
    """Do it all, and say so."""
    url, key, narrow, poor = sys.argv[1:5]
    client = OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60)
    acts: dict[str, Callable[[], None]] = {
        "chats": lambda: chats(client),
        "texts": lambda: texts(client),
        "vectors": lambda: vectors(client),
        "schemas": lambda: schemas(client),
        "models": lambda: models(client),
        "errors": lambda: errors(client, client.with_options(api_key=narrow), client.with_options(api_key=poor)),
        "closed": lambda: streams_that_are_closed(client),
        "raw": lambda: raw(client),
        "async": lambda: asyncio.run(asynchronous(url, key)),
    }
    for act in acts.values():
        act()
    sys.stdout.write(json.dumps({"version": openai.__version__, "done": list(acts)}) + "\n")


if __name__ == "__main__":
    main()
