"""Draws: the same limits as transformers, greedy with ties to the lowest id, one uniform number a position."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tenon.errors import UsageError
from tenon.infer.requests import Request
from tenon.infer.sampling import Draw, kept_tokens, sample, uniform


def _request(**changes: float) -> Request:
    return Request(
        (1,),
        temperature=changes.get("temperature", 1.0),
        top_p=changes.get("top_p", 1.0),
        top_k=int(changes.get("top_k", 0)),
        min_p=changes.get("min_p", 0.0),
        seed=int(changes.get("seed", 0)),
    )


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    draws = [Draw(Request((1,)), 1)] * 2
    assert sample(logits, draws).tolist() == [1, 0]


@pytest.mark.parametrize(
    "limits",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"temperature": 1.7, "top_k": 12, "top_p": 0.8, "min_p": 0.1},
        {"top_p": 1e-6},
        {"top_k": 1},
        {"top_k": 500},
    ],
)
def test_limits_keep_what_transformers_keeps(limits: dict[str, float]) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 2
    request = _request(**limits)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(request.temperature)])
    if request.top_k:
        warpers.append(TopKLogitsWarper(min(request.top_k, 40)))
    if request.top_p < 1:
        warpers.append(TopPLogitsWarper(request.top_p))
    if request.min_p:
        warpers.append(MinPLogitsWarper(request.min_p))
    expected = warpers(torch.zeros((1, 1), dtype=torch.long), logits[None].clone()).softmax(-1)[0]  # pyright: ignore
    ids, probabilities = kept_tokens(logits, request)
    assert sorted(ids.tolist()) == torch.nonzero(expected > 0).squeeze(-1).tolist()
    assert torch.allclose(expected[ids].double(), probabilities, atol=1e-6)


def test_top_k_takes_the_lowest_of_equal_ids() -> None:
    ids, _ = kept_tokens(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), _request(top_k=3))
    assert ids.tolist() == [1, 3, 0]


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    counts = torch.zeros(4)
    request = _request(temperature=1.0, seed=11)
    for position in range(4000):
        counts[int(sample(logits[None], [Draw(request, position)])[0])] += 1
    assert torch.allclose(counts / 4000, logits.softmax(0), atol=0.03)


def test_uniform_is_a_function_of_seed_and_position() -> None:
    numbers = [uniform(seed, position) for seed in range(60) for position in range(60)]
    assert len(set(numbers)) == 3600
    assert all(0.0 <= number < 1.0 for number in numbers)
    assert abs(sum(numbers) / 3600 - 0.5) < 0.02
    neighbours = [uniform(s, p) - uniform(s, p + 1) for s in range(60) for p in range(60)]
    assert abs(sum(n * n for n in neighbours) / 3600 - 1 / 6) < 0.02  # independent uniforms: 2 * 1/12
    assert uniform(-1, 5) == uniform(-1, 5) != uniform(1, 5)


def test_a_tiny_temperature_is_greedy() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 100
    assert sample(logits, [Draw(_request(temperature=1e-300), 4)]).tolist() == [int(logits.argmax())]


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 2.0},
        {"temperature": float("nan")},
    ],
)
def test_limits_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError) as caught:
        _request(**bad)
    assert caught.value.code == "usage-sampling"
    assert next(iter(bad)) in caught.value.what


def test_max_new_tokens_of_zero_is_refused() -> None:
    with pytest.raises(UsageError, match="usage-sampling"):
        Request((1,), max_new_tokens=0)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(UsageError, match="usage-empty-prompt"):
        Request(())
