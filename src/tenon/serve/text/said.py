"""From the tokens of one sequence to its text: detokenised, cut at stop strings, with each token's own text beside it.

This module knows no HTTP and not where tokens come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from tenon.data.tokenizer import ChatTokenizer
from tenon.infer.requests import FinishReason, Token
from tenon.serve.text.stops import StopScanner

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class SaidToken:
    """A token as text. logprob: nats; None for the first of a prompt. start: where its text begins in the sequence's.

    top: the likeliest tokens at its place, as text, with their log probabilities.
    """

    text: str
    logprob: float | None
    start: int
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What a sequence says next. index: which sequence. count: tokens that this took, said or not."""

    index: int
    text: str
    tokens: tuple[SaidToken, ...] = ()
    finish: Finish | None = None
    count: int = 0


class TokenTexts:
    """The text of single tokens, as they read inside a text."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokenizer = tokenizer
        # Decoders drop the space before a text's first token, so every token is read after another one.
        self._before = tokenizer.encode("a")[-1:]
        self._skip = len(tokenizer.decode(self._before))
        self.of = lru_cache(maxsize=65536)(self._of)

    def _of(self, token_id: int) -> str:
        return self.tokenizer.decode([*self._before, token_id], keep_special=True)[self._skip :]

    def said(self, token: Token, start: int) -> SaidToken:
        """A token of an answer as text."""
        top = tuple((self.of(token_id), logprob) for token_id, logprob in token.top)
        return SaidToken(self.of(token.id), token.logprob, start, top)


class Saying:
    """The text of one sequence as its tokens come."""

    def __init__(
        self,
        index: int,
        texts: TokenTexts,
        stops: Sequence[str],
        *,
        detailed: bool,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        """detailed: pieces carry their tokens. shown: special tokens that are told as text."""
        self._index, self._texts, self._detailed = index, texts, detailed
        self._stream = texts.tokenizer.stream(shown=shown)
        self._scanner = StopScanner(stops)
        self._heard, self._said = 0, 0
        self._held: list[SaidToken] = []

    def take(self, token: Token) -> Piece:
        """The next token. A piece with finish `stop` is the last: a stop string is complete."""
        if self._detailed:
            self._held.append(self._texts.said(token, self._heard))
        piece = self._stream.push(token.id)
        self._heard += len(piece)
        text = self._scanner.push(piece)
        return self._piece(text, finish="stop" if self._scanner.found else None, count=1)

    def end(self, finish: FinishReason) -> Piece:
        """No token follows."""
        text = self._scanner.push(self._stream.finish())
        stopped = self._scanner.found or finish == "stop"
        return self._piece(text + self._scanner.finish(), finish="stop" if stopped else "length", count=0)

    def _piece(self, text: str, *, finish: Finish | None, count: int) -> Piece:
        """A piece with the tokens that its text tells; those of a stop string are left out."""
        self._said += len(text)
        everything = finish is not None and not self._scanner.found
        told = [token for token in self._held if everything or token.start < self._said]
        self._held = self._held[len(told) :]
        return Piece(self._index, text, tuple(told), finish, count)
