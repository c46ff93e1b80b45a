"""What the clients of a soak do, and what each of them remembers of it.

Whatever is asked with the steady key runs to its end, so that its tokens are known exactly; what is cut off has a key
of its own. This module does not know how the server is started, nor what is held against its counters.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.soak_wire import Address, Exchange

CHAT, TEXT, VECTORS, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models"
WORDS = (
    "the",
    "house",
    "at",
    "the",
    "lake",
    "was",
    "warm",
    "when",
    "others",
    "came",
    "home",
    "and",
    "spoke",
    "weather",
)
SCHEMA = {
    "type": "object",
    "properties": {"place": {"enum": ["lake", "house"]}, "warm": {"type": "boolean"}},
    "required": ["place", "warm"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class Keys:
    """As they are typed. narrow may ask `fixed-*` alone; poor has used what it may use."""

    steady: str
    cut: str
    narrow: str
    poor: str


@dataclass(slots=True)
class Tally:
    """statuses: answers by route and status, as clients saw them; cut: by route, those whose end nobody saw.

    tokens: of all usage fields. cut_least, cut_most: what was cut off may have come to. unexpected: what must not be.
    """

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    cut_least: int = 0
    cut_most: int = 0
    repeated: int = 0
    unexpected: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Guests:
    """Names that come and go while the load runs: whoever asks one may find it gone."""

    names: list[str] = field(default_factory=list)


class Client:
    """One client, which does one thing after the other until it is told to stop."""

    def __init__(
        self,
        address: Address,
        keys: Keys,
        tally: Tally,
        guests: Guests,
        *,
        fixed: Sequence[str],
        alias: str,
        context_tokens: int,
        has_schema: bool,
        seed: int,
    ) -> None:
        """fixed: models that are always there, the base among them. alias: of a name that flips between versions."""
        self._address, self._keys, self._tally, self._guests = address, keys, tally, guests
        self._fixed, self._alias, self._context = fixed, alias, context_tokens
        self._draw = random.Random(seed)
        self._kinds = {
            self.answer: 20,
            self.stream: 20,
            self.slow: 4,
            self.repeat: 12,
            self.cut_stream: 12,
            self.cut_whole: 6,
            self.wrong: 10,
            self.vectors: 6,
            self.score: 6,
            self.list: 2,
        }
        if has_schema:
            self._kinds[self.schema] = 8
        self.known: dict[int, str] = {}

    async def run(self, until: asyncio.Event) -> None:
        """Ask until the event is set."""
        while not until.is_set():
            (act,) = self._draw.choices(list(self._kinds), weights=list(self._kinds.values()))
            self._tally.kinds[act.__name__] += 1
            try:
                await act()
            except (OSError, EOFError, ValueError, KeyError, IndexError) as error:
                self._tally.unexpected.append(f"{act.__name__}: {type(error).__name__} {error}")

    # ---- what runs to its end -----------------------------------------------------------------------------------

    async def answer(self) -> None:
        """A whole answer, short or long, one or two of it."""
        body = {"model": self._name(), "max_tokens": self._draw.randint(1, 40), "n": self._draw.choice((1, 1, 1, 2))}
        if self._draw.random() < 0.5:
            await self._ask(TEXT, {**body, "prompt": self._text(), "stop": self._draw.choice((None, ["the", "\n"]))})
        else:
            await self._ask(CHAT, {**body, "messages": [{"role": "user", "content": self._text()}]})

    async def stream(self) -> None:
        """A stream that is read as fast as it comes."""
        await self._stream(pause_seconds=0.0)

    async def slow(self) -> None:
        """A stream whose reader takes its time."""
        await self._stream(pause_seconds=0.1)

    async def schema(self) -> None:
        """An answer that has to be of a schema."""
        form = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}
        body = {"model": self._name(), "max_tokens": 60, "messages": [{"role": "user", "content": self._text()}]}
        await self._ask(CHAT, {**body, "response_format": form})

    async def vectors(self) -> None:
        """A few texts as vectors."""
        body = {"model": self._name(), "input": [self._text() for _ in range(self._draw.randint(1, 6))]}
        await self._ask(VECTORS, {**body, "pooling": self._draw.choice(("mean", "last"))})

    async def score(self) -> None:
        """A prompt's own probabilities."""
        body = {"model": self._name(), "prompt": self._text(), "echo": True, "logprobs": 1}
        await self._ask(TEXT, {**body, "max_tokens": self._draw.choice((0, 1))})

    async def list(self) -> None:
        """Who is there."""
        await self._ask(MODELS, None)

    async def repeat(self) -> None:
        """A seeded request that was answered before anything else ran, or by another client: the same text again."""
        seed = self._draw.randrange(24)
        found = await self._ask(TEXT, seeded(self._fixed, seed))
        if found is None:
            return
        text = found["choices"][0]["text"]
        if self.known.setdefault(seed, text) != text:
            self._tally.unexpected.append(f"repeat: seed {seed} said {text!r}, before {self.known[seed]!r}")
        self._tally.repeated += 1

    async def _ask(self, route: str, body: dict[str, Any] | None) -> Any:
        """A request that runs to its end, and its tokens; None where a guest had gone."""
        async with Exchange(self._address, route, body, self._keys.steady) as exchange:
            status = await exchange.status()
            found = await exchange.whole()
        return found if self._note(route, status, body, found) else None

    def _note(self, route: str, status: int, body: dict[str, Any] | None, found: Any) -> bool:
        self._tally.statuses[route, status] += 1
        if status == 200:
            self._tally.tokens += found["usage"]["total_tokens"] if route != MODELS else 0
            return True
        gone = body is not None and str(body["model"]).startswith("guest-") and status in (404, 422)
        if not gone:
            self._tally.unexpected.append(f"{route} {body and body['model']}: {status} {found}")
        return False

    async def _stream(self, *, pause_seconds: float) -> None:
        body = {
            "model": self._name(),
            "prompt": self._text(),
            "max_tokens": self._draw.randint(1, 40),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with Exchange(self._address, TEXT, body, self._keys.steady) as exchange:
            status = await exchange.status()
            if status != 200:
                self._note(TEXT, status, body, await exchange.whole())
                return
            last: dict[str, Any] = {}
            async for event in exchange.events():
                last = event
                await asyncio.sleep(pause_seconds)
            self._note(TEXT, status, body, last)

    # ---- what is cut off ----------------------------------------------------------------------------------------

    async def cut_stream(self) -> None:
        """A stream whose client goes away after some events."""
        body, events = {**self._ids(), "stream": True}, self._draw.randint(1, 12)
        seen = 0
        async with Exchange(self._address, TEXT, body, self._keys.cut) as exchange:
            await exchange.status()
            async for _event in exchange.events():
                seen += 1
                if seen == events:
                    break
        # Each event but the last tells at least one token; what a client saw was made before.
        self._cut(body, least=len(body["prompt"]) + max(seen - 1, 0))

    async def cut_whole(self) -> None:
        """A request whose client does not wait for the answer."""
        body = self._ids()
        async with Exchange(self._address, TEXT, body, self._keys.cut):
            await asyncio.sleep(self._draw.choice((0.05, 0.2, 0.5)))
        self._cut(body, least=0)

    def _cut(self, body: dict[str, Any], *, least: int) -> None:
        self._tally.cut[TEXT] += 1
        self._tally.cut_least += least
        self._tally.cut_most += len(body["prompt"]) + body["max_tokens"]

    def _ids(self) -> dict[str, Any]:
        """A request of known length, which no stop token ends."""
        prompt = [self._draw.randrange(20, 250) for _ in range(self._draw.randint(2, 60))]
        return {"model": self._draw.choice(self._fixed), "prompt": prompt, "max_tokens": 64, "ignore_eos": True}

    # ---- what is refused ----------------------------------------------------------------------------------------

    async def wrong(self) -> None:
        """A request that must be refused, each with its status."""
        text = {"model": "base", "prompt": "the", "max_tokens": 2}
        cases: list[tuple[int, str, Any, str]] = [
            (400, TEXT, {**text, "temperature": 9}, self._keys.steady),
            (400, TEXT, {**text, "surprise": 1}, self._keys.steady),
            (400, TEXT, b'{"model": "base", "prompt": "\xff"}', self._keys.steady),
            (400, TEXT, {**text, "prompt": [5] * (self._context + 5)}, self._keys.steady),
            (400, VECTORS, {"model": "base", "input": ""}, self._keys.steady),
            (401, TEXT, text, "tn-00000000-wrong"),
            (403, TEXT, text, self._keys.narrow),
            (404, TEXT, {**text, "model": "../nobody"}, self._keys.steady),
            (404, CHAT, {"model": "nobody", "messages": [{"role": "user", "content": "x"}]}, self._keys.steady),
            (413, TEXT, {**text, "prompt": "x" * (5 << 20)}, self._keys.steady),
            (429, TEXT, text, self._keys.poor),
        ]
        wanted, route, body, key = self._draw.choice(cases)
        async with Exchange(self._address, route, body, key) as exchange:
            status = await exchange.status()
            found = await exchange.whole()
        self._tally.statuses[route, status] += 1
        if status != wanted or "error" not in found:
            self._tally.unexpected.append(f"wrong: {status} and not {wanted}: {found}")

    # ---- what is asked ------------------------------------------------------------------------------------------

    def _name(self) -> str:
        """Somebody who is there, or was a moment ago."""
        if self._guests.names and self._draw.random() < 0.4:
            return self._draw.choice(self._guests.names)
        return self._draw.choice([*self._fixed, self._alias])

    def _text(self) -> str:
        """A short prompt, or one in five a long one."""
        most = self._context // 6 if self._draw.random() < 0.2 else 12
        return " ".join(self._draw.choices(WORDS, k=self._draw.randint(1, most)))


def seeded(fixed: Sequence[str], seed: int) -> dict[str, Any]:
    """The request that always has the same answer."""
    prompt = " ".join(WORDS[: 3 + seed % 7])
    temperature = (0.0, 0.8, 1.2)[seed % 3]
    return {
        "model": fixed[seed % len(fixed)], "prompt": prompt, "max_tokens": 24, "seed": seed, "temperature": temperature,
    }  # fmt: skip
