"""Clients that keep an OpenAI server busy: how many tokens a second come back, and how long the first one takes.

    load = await drive("http://127.0.0.1:8000/v1", wanted, clients=16)

Every client asks for the next completion when its last one is complete. The answers are streamed, and looked at no more
than is needed to see the first token and the usage, so that the clients take little of the machine that they measure.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import httpx

from benchmarks.report import REPOSITORY

_TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """One completion: so many tokens of answer, whatever they say."""

    model: str
    prompt: str
    answer_tokens: int

    def body(self) -> dict[str, object]:
        """What is posted to /v1/completions; greedy, and not ended by an end-of-text token."""
        return {
            "model": self.model,
            "prompt": self.prompt,
            "max_tokens": self.answer_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


@dataclass(frozen=True, slots=True)
class Load:
    """What came back. first_seconds: of each answer, from the request to its first token, shortest first."""

    seconds: float
    prompt_tokens: int
    answer_tokens: int
    first_seconds: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float:
        """Tokens of answers in all the time, that for reading prompts included."""
        return self.answer_tokens / self.seconds

    def first(self, percent: int) -> float:
        """Seconds to the first token, at a percentile."""
        if len(self.first_seconds) == 1:
            return self.first_seconds[0]
        return statistics.quantiles(self.first_seconds, n=100, method="inclusive")[percent - 1]


async def drive(url: str, wanted: Sequence[Wanted], *, clients: int, key: str = "") -> Load:
    """Have all completions made, `clients` at a time, in the order given. url: OpenAI's base_url."""
    waiting = iter(wanted)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=_TIMEOUT_SECONDS, limits=limits, trust_env=False
    ) as client:
        began = time.perf_counter()
        answers = await asyncio.gather(*(_ask_all(client, waiting) for _ in range(clients)))
        seconds = time.perf_counter() - began
    flat = [answer for some in answers for answer in some]
    assert len(flat) == len(wanted)
    return Load(
        seconds,
        prompt_tokens=sum(prompt for _, prompt, _ in flat),
        answer_tokens=sum(tokens for _, _, tokens in flat),
        first_seconds=tuple(sorted(first for first, _, _ in flat)),
    )


async def _ask_all(client: httpx.AsyncClient, waiting: Iterator[Wanted]) -> list[tuple[float, int, int]]:
    """One client: (seconds to the first token, tokens of the prompt, of the answer) of each of its answers."""
    return [await ask(client, wanted) for wanted in waiting]


async def ask(client: httpx.AsyncClient, wanted: Wanted) -> tuple[float, int, int]:
    """One answer: seconds to its first token, tokens of the prompt, of the answer. client: with OpenAI's base_url."""
    began = time.perf_counter()
    first, tail = 0.0, b""
    async with client.stream("POST", "/completions", json=wanted.body()) as answer:
        if answer.status_code != 200:
            raise SystemExit(f"{client.base_url} answers {answer.status_code}: {(await answer.aread()).decode()}")
        async for data in answer.aiter_raw():
            first = first or time.perf_counter() - began
            tail = tail[-4096:] + data
    usage = _usage(tail)
    if usage["completion_tokens"] != wanted.answer_tokens:
        raise SystemExit(f"{client.base_url}: {usage['completion_tokens']} tokens, not {wanted.answer_tokens}")
    return first, usage["prompt_tokens"], usage["completion_tokens"]


def _usage(tail: bytes) -> dict[str, int]:
    """The usage, which is in the last chunk of a stream."""
    events = [line.removeprefix(b"data: ") for line in tail.splitlines() if line.startswith(b"data: {")]
    last = json.loads(events[-1])
    if not last.get("usage"):
        raise SystemExit(f"a stream ends without its usage: {last}")
    return last["usage"]


def read_texts(*, fewest_words: int, most_words: int) -> Iterator[str]:
    """Pieces of the project's own documentation one after the other, their lengths evenly spread; no two begin alike
    in a cache's eyes. Begins again, one word further, when all is used up.
    """
    files = sorted((REPOSITORY / "docs").rglob("*.md"))
    words = [word for path in files for word in path.read_text("utf-8").split()]
    lengths = range(fewest_words, most_words + 1)
    for offset in range(fewest_words):
        at = offset
        for turn in range(len(words)):
            # Steps of a number that shares no factor with most ranges visit all lengths in a mixed order.
            length = lengths[(turn * 37) % len(lengths)]
            if at + length > len(words):
                break
            yield " ".join(words[at : at + length])
            at += length
