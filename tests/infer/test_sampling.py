"""Draws: the same limits as transformers, greedy with ties to the lowest id, a race of all tokens at each position."""

from __future__ import annotations

import numpy as np
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
from tenon.infer import sampling
from tenon.infer.requests import Request
from tenon.infer.sampling import Draw, waiting_times


def kept_tokens(logits_V: torch.Tensor, request: Request) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain reference: ids and probabilities of what the limits leave, one row, all of it sorted."""
    scores_V, ids_V = ((logits_V.double() - logits_V.max()) / request.temperature).sort(descending=True, stable=True)
    if request.top_k:
        scores_V, ids_V = scores_V[: request.top_k], ids_V[: request.top_k]
    probabilities_V = scores_V.softmax(dim=0)
    keep_V = probabilities_V.cumsum(0) - probabilities_V < request.top_p
    keep_V &= probabilities_V >= request.min_p * probabilities_V[0]
    keep_V[0] = True
    return ids_V[keep_V], probabilities_V[keep_V] / probabilities_V[keep_V].sum()


MASK = (1 << 64) - 1


def mixed(value: int) -> int:
    """SplitMix64 in whole numbers: a step and the finaliser."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def times_plainly(seed: int, position: int, ids: np.ndarray) -> np.ndarray:
    """The waiting times of tokens, in float64 from unsigned numbers."""
    state = np.uint64(mixed((mixed(seed & MASK) + position + 1) & MASK))
    with np.errstate(over="ignore"):
        z = state + (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return -np.log1p(-((z >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)


def drawn_plainly(logits_V: torch.Tensor, draw: Draw) -> int:
    """The token that one row draws: of what is kept, the first to come."""
    ids_V, probabilities_V = kept_tokens(logits_V, draw.request)
    times = times_plainly(draw.request.seed, draw.position, ids_V.numpy())
    return int(ids_V[np.argmax(probabilities_V.numpy() / times)])


def sample(logits_SV: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    """What the engine does: the quick way, and the whole vocabulary for what that leaves open."""
    chosen = sampling.sample(logits_SV, draws)
    rest = torch.nonzero(~chosen.settled_S).squeeze(-1)
    if len(rest):
        chosen.ids_S[rest] = sampling.sample_rest(logits_SV, draws, rest.tolist())
    return chosen.ids_S


RULES: list[dict[str, float]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.6},
    {"temperature": 1.9},
    {"top_k": 1},
    {"top_k": 7, "temperature": 1.4},
    {"top_k": 129},
    {"top_k": 2500},
    {"top_k": 10**30, "top_p": 0.9},
    {"top_p": 0.3},
    {"top_p": 0.97},
    {"top_p": 0.9999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"min_p": 1e-9},
    {"top_k": 600, "top_p": 0.99, "min_p": 1e-4, "temperature": 2.0},
    {"temperature": 1e-300},
]


@pytest.mark.parametrize("vocabulary", [40, 128, 3001, 6000])
@pytest.mark.parametrize("kind", ["peaked", "flat", "coarse", "equal"])
def test_rows_drawn_together_are_those_drawn_one_by_one(kind: str, vocabulary: int) -> None:
    """coarse: many scores are equal, as in bfloat16; equal: all are."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn((25 * len(RULES), vocabulary), generator=generator)
    logits *= {"peaked": 6.0, "flat": 0.3, "coarse": 2.0, "equal": 0.0}[kind]
    logits = logits.round() if kind == "coarse" else logits
    draws = [Draw(request_with(**RULES[i % len(RULES)], seed=i % 7), i) for i in range(len(logits))]
    expected = [
        drawn_plainly(row, draw) if draw.request.temperature else int(row.argmax())
        for row, draw in zip(logits, draws, strict=True)
    ]
    assert sample(logits, draws).tolist() == expected
    settled = sampling.sample(logits, draws).settled_S
    if vocabulary <= 128:
        assert settled.all()
    elif kind == "peaked":
        assert 0.6 < settled.float().mean() < 1.0  # both ways were taken


@pytest.mark.parametrize("limits", [{}, {"temperature": 0.8, "top_p": 0.95}, {"top_k": 900}, {"min_p": 0.001}])
def test_the_last_bits_of_scores_hardly_ever_change_a_draw(limits: dict[str, float]) -> None:
    """They differ with a batch's shape, by far less than here. In a long flat tail all neighbours change places."""
    generator = torch.Generator().manual_seed(9)
    logits = torch.randn((1000, 20_000), generator=generator)
    shaken = logits + 1e-4 * torch.randn(logits.shape, generator=generator)
    draws = [Draw(request_with(**limits, seed=3), i) for i in range(len(logits))]
    assert (sample(logits, draws) != sample(shaken, draws)).sum() <= 2


def test_what_is_not_drawn_and_what_is_not_finite_stops_nobody() -> None:
    logits = torch.randn((4, 900), generator=torch.Generator().manual_seed(5))
    logits[1, 3], logits[2] = float("nan"), float("inf")
    draws = [
        Draw(request_with(seed=1), 3),
        Draw(request_with(), 3),
        Draw(request_with(), 3),
        Draw(request_with(seed=1), 3, drawn=False),
    ]
    found = sample(logits, draws)
    assert found[0] == drawn_plainly(logits[0], draws[0]) and found[3] == logits[3].argmax()
    assert ((found >= 0) & (found < 900)).all()


def request_with(**changes: float) -> Request:
    """A request with some rules of drawing."""
    return Request(
        (1,),
        temperature=changes.get("temperature", 1.0),
        top_p=changes.get("top_p", 1.0),
        top_k=int(changes.get("top_k", 0)),
        min_p=changes.get("min_p", 0.0),
        seed=int(changes.get("seed", 0)),
        presence_penalty=changes.get("presence_penalty", 0.0),
        frequency_penalty=changes.get("frequency_penalty", 0.0),
        repetition_penalty=changes.get("repetition_penalty", 1.0),
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
    request = request_with(**limits)
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
    logits = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]).repeat(200, 1)
    assert set(sample(logits, [Draw(request_with(top_k=3), i) for i in range(200)]).tolist()) == {0, 1, 3}


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    counts = torch.zeros(4)
    request = request_with(temperature=1.0, seed=11)
    found = sample(logits.expand(4000, -1), [Draw(request, position) for position in range(4000)])
    counts.scatter_add_(0, found, torch.ones(4000))
    assert torch.allclose(counts / 4000, logits.softmax(0), atol=0.03)


def test_waiting_times_are_exponential_and_independent() -> None:
    states = [mixed((mixed(seed) + position + 1) & MASK) for seed in range(8) for position in range(8)]
    stream = torch.tensor([state - (1 << 64) if state >> 63 else state for state in states])[:, None]
    times = waiting_times(stream, torch.arange(20_000)).double()
    expected = np.stack([times_plainly(s, p, np.arange(20_000)) for s in range(8) for p in range(8)])
    assert np.allclose(np.expm1(-times.numpy()), np.expm1(-expected), rtol=3e-7, atol=0)
    assert torch.unique(times.float()).numel() > 0.95 * times.numel() and times.min() > 0
    for quantile in (0.001, 0.1, 0.5, 0.9, 0.999):
        at = -np.log1p(-quantile)
        assert (
            abs(float((times < at).double().mean()) - quantile) < 6 * (quantile * (1 - quantile) / times.numel()) ** 0.5
        )
    for a, b in ((times[:, 1:], times[:, :-1]), (times[1:], times[:-1]), (times[8:], times[:-8])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.005


def test_a_tiny_temperature_is_greedy() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 100
    assert sample(logits, [Draw(request_with(temperature=1e-300), 4)]).tolist() == [int(logits.argmax())]


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 2.0},
        {"temperature": float("nan")},
        {"presence_penalty": float("nan")},
        {"frequency_penalty": float("inf")},
        {"repetition_penalty": 0.0},
    ],
)
def test_limits_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError) as caught:
        request_with(**bad)
    assert caught.value.code == "usage-sampling"
    assert next(iter(bad)) in caught.value.what


def test_max_new_tokens_of_zero_is_refused() -> None:
    with pytest.raises(UsageError, match="usage-sampling"):
        Request((1,), max_new_tokens=-1)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(UsageError, match="usage-empty-prompt"):
        Request(())
