"""An event of a stream is one line for every client, whatever an answer says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

from hypothesis import example, given
from hypothesis import strategies as st

from tenon.serve.api.replies import ChatChunk, ChatChunkChoice, ChatDelta
from tenon.serve.api.streams import DONE, events


@given(st.text())
@example("灯\u2028火\u2029\x85")
@example("\r\n\x0b\x0c\x1c\x1d\x1e")
def test_no_character_of_an_answer_ends_a_line(text: str) -> None:
    """Python's str.splitlines, by which httpx reads lines, knows more ends of a line than the specification does."""
    first, done = asyncio.run(sent(text))
    assert done == DONE and first.endswith("\n\n") and first.rstrip("\n").splitlines() == [first.rstrip("\n")]
    assert json.loads(first.removeprefix("data: "))["choices"][0]["delta"]["content"] == text


async def sent(text: str) -> list[str]:
    """The events of an answer of one chunk."""
    choice = ChatChunkChoice(index=0, delta=ChatDelta(content=text), logprobs=None, finish_reason=None)
    chunk = ChatChunk(
        id="chatcmpl-1", object="chat.completion.chunk", created=1, model="m", choices=[choice], system_fingerprint="f"
    )

    async def chunks() -> AsyncIterator[ChatChunk]:
        yield chunk

    return [event async for event in events(chunks())]
