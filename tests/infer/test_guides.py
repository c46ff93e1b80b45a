"""Answers held to grammars in the engine: mixed with free ones, drawn and greedy, computed again, and refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from tenon.errors import TenonError, UsageError
from tenon.infer.engine import Engine
from tenon.infer.generate import generate
from tenon.infer.guides import masked
from tenon.infer.requests import Request
from tests.infer.test_paged import HOUSE, assert_same, engine_of, run

DECODER = HOUSE[0]
PROMPT = (3, 5, 9, 11)


@dataclass
class Listed:
    """A grammar of lists: at each place the tokens that may come there; after the last one nothing may."""

    places: list[list[int]]
    at: int = 0
    error: TenonError | None = None

    @property
    def complete(self) -> bool:
        return self.at == len(self.places)

    def push(self, token_id: int) -> None:
        if token_id not in self.places[self.at]:
            self.error = UsageError("usage-grammar", "not allowed", hint="-")
        self.at += 1


class Lists:
    """`Guides` for such lists, written as JSON; "costly" fails at its second token."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def check(self, grammar: str) -> None:
        self.start(grammar, frozenset())

    def start(self, grammar: str, stop_ids: frozenset[int]) -> Listed:
        return Listed([[1], [2], [3]] if grammar == "costly" else json.loads(grammar))

    def masks(self, guides: Sequence[Listed]) -> np.ndarray:
        self.calls.append(len(guides))
        found = np.zeros((len(guides), 4), dtype=np.uint32)
        for row, guide in enumerate(guides):
            if guide.places == [[1], [2], [3]] and guide.at == 1:
                guide.error = UsageError("usage-grammar", "too much work", hint="-")
                continue
            for token in guide.places[guide.at]:
                found[row, token // 32] |= np.uint32(1 << (token % 32))
        return found.view(np.int32)


def best_of(choices: list[int], before: Sequence[int]) -> int:
    """The likeliest of some tokens, by the model's own log probabilities."""
    (found,) = generate(DECODER, None, [Request([*before, 0], max_new_tokens=1, prompt_logprobs=True, top_logprobs=97)])
    scores = dict(found.prompt[-1].top)
    return max(choices, key=lambda token: (scores[token], -token))


def test_masks_leave_what_they_allow() -> None:
    logits = torch.randn((3, 97), generator=torch.Generator().manual_seed(0))
    masks = np.zeros((2, 4), dtype=np.uint32)
    masks[0, [0, 3]], masks[1, 1] = [0x80000001, 1], 0xFFFFFFFF
    found = masked(logits, [2, 0], masks.view(np.int32))
    assert torch.equal(found[1], logits[1])
    assert torch.isfinite(found[2]).nonzero().squeeze(-1).tolist() == [0, 31, 96]
    assert torch.isfinite(found[0]).nonzero().squeeze(-1).tolist() == list(range(32, 64))
    assert torch.equal(found[2, [0, 31, 96]], logits[2, [0, 31, 96]])


def test_greedy_takes_the_best_of_what_is_allowed_and_logprobs_stay_the_models() -> None:
    places = [[7, 8, 9, 90], [20], [5, 96, 33], [1, 2]]
    request = Request(PROMPT, max_new_tokens=20, grammar=json.dumps(places), top_logprobs=97)
    (found,) = generate(DECODER, None, [request], guides=Lists())
    expected: list[int] = []
    for choices in places:
        expected.append(best_of(choices, [*PROMPT, *expected]))
    assert (list(found.ids), found.finish) == (expected, "stop")
    (scored,) = generate(
        DECODER, None, [Request([*PROMPT, *expected], max_new_tokens=1, prompt_logprobs=True)], guides=Lists()
    )
    assert found.logprobs == pytest.approx([token.logprob for token in scored.prompt[len(PROMPT) - 1 :]], abs=1e-4)


LIMITS = [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}, {"temperature": 2.0, "top_k": 3, "min_p": 0.1}]


@pytest.mark.parametrize("limits", LIMITS)
def test_draws_stay_inside_and_company_changes_nothing(limits: dict[str, float]) -> None:
    places = [[7, 8, 9], [20, 21], [5, 96]] * 2
    held = [
        Request([*PROMPT, i], max_new_tokens=12, seed=i, grammar=json.dumps(places), **limits)  # pyright: ignore
        for i in range(4)
    ]
    free = [replace(request, grammar=None) for request in held]
    alone = [generate(DECODER, None, [request], guides=Lists())[0] for request in (*held, *free)]
    together = generate(DECODER, None, [*held, *free], guides=Lists())
    assert_same(together, alone)
    for completion in together[:4]:
        assert all(token in choices for token, choices in zip(completion.ids, places, strict=True))
        assert completion.finish == "stop"
    assert all(completion.finish == "length" for completion in together[4:])


def test_who_is_preempted_goes_on_in_its_grammar_and_a_pass_asks_once() -> None:
    places = [[7, 8, 9], [20, 21], [5, 96]] * 8
    requests = [Request([*PROMPT, i], max_new_tokens=60, grammar=json.dumps(places)) for i in range(3)]
    alone = [generate(DECODER, None, [request], guides=Lists())[0] for request in requests]
    guides, engine = Lists(), engine_of(HOUSE, blocks=20)
    held = Engine(HOUSE[0], HOUSE[1], cache=engine._cache, pass_tokens=64, keep_prefixes=True, guides=guides)
    assert_same(run(held, requests), alone)
    assert held.stats().preemptions > 0
    assert max(guides.calls) > 1 and sum(guides.calls) == 3 * len(places)


def test_length_is_told_honestly_and_a_stop_token_ends_an_answer() -> None:
    requests = [
        Request(PROMPT, max_new_tokens=2, grammar=json.dumps([[7], [8], [9]])),
        Request(PROMPT, max_new_tokens=3, grammar=json.dumps([[7], [8], [9]])),
        Request(PROMPT, max_new_tokens=9, grammar=json.dumps([[7], [8], [9]]), stop_ids=frozenset({8})),
    ]
    found = generate(DECODER, None, requests, guides=Lists())
    assert [(c.ids, c.finish) for c in found] == [((7, 8), "length"), ((7, 8, 9), "stop"), ((7,), "stop")]


def test_a_grammar_that_costs_too_much_ends_its_own_request() -> None:
    told: dict[int, str] = {}
    base = engine_of(HOUSE, blocks=60)
    engine = Engine(
        HOUSE[0],
        HOUSE[1],
        cache=base._cache,
        pass_tokens=64,
        guides=Lists(),
        on_failure=lambda index, error: told.update({index: error.code}),
    )
    for index, grammar in enumerate(("costly", None, json.dumps([[7], [8]]))):
        engine.submit(index, Request(PROMPT, max_new_tokens=4, grammar=grammar))
    while engine.busy:
        engine.step()
    assert told == {0: "usage-grammar"} and set(engine.completions) == {1, 2}
    assert engine.completions[2].ids == (7, 8) and engine.stats().blocks_used == 0
    with pytest.raises(UsageError, match="too much work"):
        generate(DECODER, None, [Request(PROMPT, grammar="costly")], guides=Lists())


def test_a_grammar_and_a_draft_do_not_go_together() -> None:
    with pytest.raises(UsageError, match="usage-sampling"):
        Request(PROMPT, grammar="[]", draft_ids=(1,))
