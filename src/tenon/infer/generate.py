"""Answers to many requests: the cache is sized, common beginnings are found, and the engine runs to the end.

This module knows no text and no HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tenon.bases.facts import ModelFacts
from tenon.infer.engine import Engine
from tenon.infer.guides import Guides
from tenon.infer.requests import Completion, OnFinish, OnToken, Request
from tenon.models.cache import BLOCK_TOKENS, KvCache, token_bytes
from tenon.models.decoder import Bank, Decoder

# A common beginning is computed apart when that saves at least so many tokens; below, the extra pass costs more.
_MIN_SAVED_TOKENS = 64


@torch.inference_mode()
def generate(
    decoder: Decoder,
    bank: Bank | None,
    requests: Sequence[Request],
    *,
    max_rows: int = 64,
    pass_tokens: int = 1024,
    cache_bytes: int = 1 << 30,
    share_prefix: bool = True,
    guides: Guides[Any] | None = None,
    on_token: OnToken | None = None,
    on_finish: OnFinish | None = None,
) -> list[Completion]:
    """The completion of every request, in order; requests of any slots share the passes.

    max_rows: most rows at a time; fewer while the cache (cache_bytes, at least one row) does not hold so many.
    pass_tokens: most tokens of one pass. share_prefix: compute the beginning that a slot's prompts share once.
    guides: for requests with a grammar. on_token, on_finish: see there.
    A request's answer does not depend on any of these, nor on the other requests, but for the rounding of sums.

    Raises UsageError usage-grammar, AdapterError adapter-not-finite, BaseModelError base-not-finite; KeyError for a
    slot that is not in the bank.
    """
    if not requests:
        return []
    cache = _make_cache(decoder, requests, max_rows=max_rows, cache_bytes=cache_bytes)
    engine = Engine(
        decoder, bank, cache=cache, pass_tokens=pass_tokens, on_token=on_token, on_finish=on_finish, guides=guides
    )
    if share_prefix:
        engine.share_prefixes(shared_prefixes(requests, cache.capacity_tokens))
    for index, request in enumerate(requests):
        engine.submit(index, request)
    while engine.busy:
        engine.step()
    return [engine.completions[index] for index in range(len(requests))]


def place_bytes(facts: ModelFacts, *, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one sequence."""
    return tokens * token_bytes(facts, dtype)


def _make_cache(decoder: Decoder, requests: Sequence[Request], *, max_rows: int, cache_bytes: int) -> KvCache:
    """A cache of so many bytes, or less where all rows at their longest need less; at least the longest request."""
    longest = max(len(r.prompt_ids) + max(r.max_new_tokens, len(r.draft_ids)) for r in requests)
    tokens = min(longest, decoder.facts.context_tokens)
    one = place_bytes(decoder.facts, tokens=tokens + BLOCK_TOKENS, dtype=decoder.dtype)
    return KvCache(
        decoder.facts,
        places=min(max_rows, len(requests)),
        tokens=tokens,
        dtype=decoder.dtype,
        device=decoder.device,
        budget_bytes=max(cache_bytes, one),
    )


def shared_prefixes(requests: Sequence[Request], most_tokens: int) -> dict[int, list[int]]:
    """For each slot the tokens that all of its prompts begin with, where computing them once pays.

    At least the last token of every prompt stays its own: its scores are needed.
    """
    by_slot: dict[int, list[list[int]]] = {}
    for request in requests:
        by_slot.setdefault(request.slot, []).append(list(request.prompt_ids))
    shared = {}
    for slot, prompts in by_slot.items():
        common = _common_beginning(prompts)[:most_tokens]
        if len(common) * (len(prompts) - 1) >= _MIN_SAVED_TOKENS:
            shared[slot] = common
    return shared


def _common_beginning(prompts: list[list[int]]) -> list[int]:
    """What all prompts begin with, less the last token of the shortest."""
    # Whatever the first and the last in sorted order share, all between them share too.
    first, last = min(prompts), max(prompts)
    length = min(len(prompt) for prompt in prompts) - 1
    differing = (i for i in range(length) if first[i] != last[i])
    return first[: next(differing, length)]
