"""Penalties and biases: as a plain reference and transformers apply them, the same when a row is computed again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from tenon.errors import UsageError
from tenon.infer.generate import generate
from tenon.infer.penalties import penalised, seen_by
from tenon.infer.requests import Request, Token
from tests.infer.test_paged import HOUSE, assert_same, engine_of, run

DECODER = HOUSE[0]

PROMPT = (3, 5, 5, 9, 3, 11)


def plainly(logits_V: torch.Tensor, request: Request, answer: list[int]) -> torch.Tensor:
    """The reference: token by token."""
    scores = logits_V.clone()
    for token, value in request.logit_bias:
        scores[token] += value
    for token in range(len(scores)):
        count = answer.count(token)
        if token in request.prompt_ids or count:
            factor = request.repetition_penalty
            scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
        scores[token] -= request.frequency_penalty * count + request.presence_penalty * (count > 0)
    return scores


RULES = [
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.7},
    {"frequency_penalty": -0.7, "presence_penalty": 0.25},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6, "frequency_penalty": 0.3, "presence_penalty": -1.0},
    {"logit_bias": ((5, 3.0), (0, -100.0))},
    {"repetition_penalty": 1.3, "logit_bias": ((9, 2.5),)},
    {},
]


def test_every_rule_is_the_reference_and_changes_nobody_else() -> None:
    logits = torch.randn((2 * len(RULES), 50), generator=torch.Generator().manual_seed(1)) * 3
    answer = [7, 9, 7, 49, 7]
    before = logits.clone()
    asked, expected = [], []
    for s, row in enumerate(logits):
        request = Request(PROMPT, **RULES[s // 2])  # pyright: ignore[reportArgumentType]
        told = answer if s % 2 else []
        asked.append((request, seen_by(request, told)))
        expected.append(plainly(row, request, told))
    found = penalised(logits, asked)
    assert torch.allclose(found, torch.stack(expected), atol=1e-5)
    assert torch.equal(logits, before)
    assert penalised(logits, [None] * len(logits)) is logits


def test_repetition_is_that_of_transformers() -> None:
    logits = torch.randn((1, 50), generator=torch.Generator().manual_seed(2)) * 3
    request, answer = Request(PROMPT, repetition_penalty=1.7), [7, 9, 7]
    ids = torch.tensor([[*PROMPT, *answer]])
    expected = RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone())  # pyright: ignore[reportArgumentType]
    assert torch.equal(penalised(logits, [(request, seen_by(request, answer))]), expected)


def answered_plainly(request: Request) -> tuple[list[int], list[float]]:
    """Greedy, one request of one token after the other, with the model's own log probabilities."""
    answer: list[int] = []
    logprobs: list[float] = []
    for _ in range(request.max_new_tokens):
        one = Request([*request.prompt_ids, *answer], max_new_tokens=1, top_logprobs=97)
        told: list[Token] = []

        def listen(index: int, token: Token, told: list[Token] = told) -> None:
            told.append(token)

        generate(DECODER, None, [one], on_token=listen)
        scores = torch.empty(97)
        for token_id, logprob in told[0].top:
            scores[token_id] = logprob
        answer.append(int(plainly(scores, request, answer).argmax()))
        logprobs.append(float(scores[answer[-1]]))
    return answer, logprobs


# Biases and subtractions do not see that log probabilities stand for scores; repetition_penalty does.
SHIFT_FREE = [rule for rule in RULES if "repetition_penalty" not in rule]


@pytest.mark.parametrize("rule", SHIFT_FREE)
def test_an_answer_is_the_reference_and_its_logprobs_are_the_models(rule: dict[str, float]) -> None:
    request = Request(PROMPT, max_new_tokens=30, **rule)  # pyright: ignore[reportArgumentType]
    ids, logprobs = answered_plainly(request)
    (found,) = generate(DECODER, None, [request])
    assert list(found.ids) == ids
    assert found.logprobs == pytest.approx(logprobs, abs=1e-4)


def test_penalties_change_answers() -> None:
    """Otherwise the tests above would prove nothing."""
    answers = [
        completion.ids
        for completion in generate(DECODER, None, [Request(PROMPT, max_new_tokens=30, **rule) for rule in RULES])  # pyright: ignore
    ]
    assert len(set(answers)) >= len(RULES) - 1
    assert 5 not in answers[RULES.index({})] or 0 not in answers[5]


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_who_is_preempted_is_penalised_as_with_plenty_of_memory(temperature: float) -> None:
    requests = [
        Request(
            [*PROMPT, 20 + i],
            max_new_tokens=30,
            temperature=temperature,
            seed=i,
            presence_penalty=0.4,
            frequency_penalty=0.3,
            repetition_penalty=1.2,
        )
        for i in range(4)
    ]
    alone = [generate(DECODER, None, [request])[0] for request in requests]
    engine = engine_of(HOUSE, blocks=30)
    assert_same(run(engine, requests), alone)
    assert engine.stats().preemptions > 0


@pytest.mark.parametrize("cut", [0, 4, 30])
def test_a_draft_is_penalised_as_the_answer_is(cut: int) -> None:
    """The first `cut` tokens of the draft are right."""
    plain = Request(PROMPT, max_new_tokens=30, frequency_penalty=0.8, repetition_penalty=1.1)
    (expected,) = generate(DECODER, None, [plain])
    draft = [*expected.ids[:cut], *((token + 1) % 97 for token in expected.ids[cut:])]
    (found,) = generate(DECODER, None, [replace(plain, draft_ids=draft)])
    assert found.ids == expected.ids and found.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


@pytest.mark.parametrize("bias", [((3, 1.0), (3, 2.0)), ((-1, 1.0),), ((1, float("inf")),)])
def test_a_bias_that_is_none_is_refused(bias: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(UsageError, match="usage-sampling"):
        Request(PROMPT, logit_bias=bias)
