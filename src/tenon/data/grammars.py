"""Answers held to a grammar: compiled by llguidance over the real bytes of the base's tokens, within stated limits.

A grammar is a text in llguidance's own form (Lark, or its JSON); `schemas` writes it from a JSON schema. Compiling and
every step after it have a bound in work, so that no grammar holds up whoever asks for it, or the others of a pass.
This module knows no requests and no rows.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property, lru_cache

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par

from tenon.data.token_bytes import token_bytes
from tenon.data.tokenizer import ChatTokenizer
from tenon.errors import BaseModelError, TenonError, UsageError

LONGEST_GRAMMAR = 262_144
# Grammars that are kept compiled, for the next request that has the same.
_KEPT = 128
# In llguidance's units; on one core about: 20 ms to build the lexer, 14 ms and 3 ms for one mask, 100 MB of its states.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_items_in_row=2_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)


class Progress:
    """How far one answer has come in its grammar: a `Guide` of the engine."""

    def __init__(self, matcher: LLMatcher, stop_ids: Sequence[int]) -> None:
        self.matcher, self.stop_ids = matcher, np.array(stop_ids, dtype=np.int64)

    @property
    def complete(self) -> bool:
        """Whether nothing may follow any more."""
        return self.matcher.is_stopped() and not self.matcher.is_error()

    @property
    def error(self) -> TenonError | None:
        """Why it cannot go on: a step needed more work than the limits allow."""
        return _refused(self.matcher.get_error()) if self.matcher.is_error() else None

    def push(self, token_id: int) -> None:
        """The answer has one more token."""
        self.matcher.consume_token(token_id)


class Grammars:
    """The grammars of one base: `Guides` of the engine, and the check before a request is let in. Any thread."""

    def __init__(self, tokenizer: ChatTokenizer, *, vocabulary: int) -> None:
        """vocabulary: scores that the base gives; it may be more than the tokenizer has tokens."""
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._words = (vocabulary + 31) // 32
        self._building = threading.Lock()
        self._compiled = lru_cache(maxsize=_KEPT)(self._compile)

    def check(self, grammar: str) -> None:
        """Compile a grammar, and keep it. Raises UsageError usage-grammar, BaseModelError base-tokenizer-kind."""
        self._compiled(grammar)

    def start(self, grammar: str, stop_ids: frozenset[int]) -> Progress:
        """See `Guides`."""
        ends = stop_ids or frozenset({self._eos_id})
        return Progress(self._compiled(grammar).deep_copy(), sorted(i for i in ends if i < self._vocabulary))

    def masks(self, guides: Sequence[Progress]) -> np.ndarray:
        """See `Guides`."""
        masks_GW = np.zeros((len(guides), self._words), dtype=np.int32)
        if len(guides) == 1:
            fill_next_token_bitmask(guides[0].matcher, masks_GW)
        elif guides:
            fill_next_token_bitmask_par(
                self._executor, [(guide.matcher, row) for row, guide in enumerate(guides)], masks_GW
            )
        word, bit = self._eos_id // 32, np.uint32(1 << (self._eos_id % 32))
        bits_GW = masks_GW.view(np.uint32)
        ends_G = (bits_GW[:, word] & bit) != 0
        bits_GW[:, word] &= ~bit
        for row in np.flatnonzero(ends_G).tolist():
            stops = guides[row].stop_ids
            np.bitwise_or.at(bits_GW[row], stops // 32, np.uint32(1) << (stops % 32).astype(np.uint32))
        return masks_GW

    def _compile(self, grammar: str) -> LLMatcher:
        if len(grammar) > LONGEST_GRAMMAR:
            raise _refused(f"it has {len(grammar):,} characters, and at most {LONGEST_GRAMMAR:,} are read")
        matcher = LLMatcher(self._tokens, grammar, log_level=0, limits=_LIMITS)
        if not matcher.is_error():
            # The first mask finds what the grammar's size does not tell: too many ways to begin.
            tried = matcher.deep_copy()
            fill_next_token_bitmask(tried, np.zeros((1, self._words), dtype=np.int32))
            matcher = tried if tried.is_error() else matcher
        if matcher.is_error():
            raise _refused(matcher.get_error())
        return matcher

    @cached_property
    def _eos_id(self) -> int:
        eos = self._tokenizer.eos_id
        if eos is None:
            raise BaseModelError(
                "base-tokenizer-kind",
                "this base has no token that ends an answer, so its answers cannot be held to a grammar",
                hint="set eos_token in the base's tokenizer_config.json",
            )
        return eos

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor()

    @property
    def _tokens(self) -> LLTokenizer:
        with self._building:
            return self._vocabulary_tree

    @cached_property
    def _vocabulary_tree(self) -> LLTokenizer:
        """Every token by its bytes. Takes about a second for 100,000 of them."""
        return LLTokenizer(TokenizerWrapper(_Bytes(self._tokenizer, self._eos_id, self._vocabulary)))


class _Bytes:
    """A tokenizer as llguidance reads it."""

    def __init__(self, tokenizer: ChatTokenizer, eos_id: int, vocabulary: int) -> None:
        known = token_bytes(tokenizer)[:vocabulary]
        self.tokens = known + [b""] * (vocabulary - len(known))
        self.eos_token_id, self.bos_token_id = eos_id, tokenizer.bos_id
        # Nothing that a grammar writes is ever a token that carries structure.
        self.special_token_ids = sorted(i for i in tokenizer.special_ids | {eos_id} if i < vocabulary)
        self._encode = tokenizer.encode_continuation

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def _refused(reason: str) -> UsageError:
    first = reason.strip().splitlines()[0] if reason.strip() else "it cannot be read"
    return UsageError(
        "usage-grammar",
        f"the answer cannot be held to this schema or grammar: {first[:300]}",
        hint="make it smaller or simpler, or leave out what it names (docs/serving.md)",
    )
