"""Draws on a GPU: what the plain reference draws on a CPU, in whichever company."""

from __future__ import annotations

import pytest
import torch

from tenon.infer.sampling import Draw
from tests.gpu.kit import INTERPRETED
from tests.infer.test_sampling import RULES, drawn_plainly, request_with, sample

pytestmark = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")


@pytest.mark.parametrize("vocabulary", [128, 3001, 49_152, 128_256])
@pytest.mark.parametrize("kind", ["peaked", "flat", "coarse"])
def test_draws_are_those_of_the_plain_reference(device: torch.device, kind: str, vocabulary: int) -> None:
    """An exponential's last bit may move an edge past a point, once in some hundred thousand draws."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn((8 * len(RULES), vocabulary), generator=generator)
    logits *= {"peaked": 6.0, "flat": 0.3, "coarse": 2.0}[kind]
    logits = logits.round() if kind == "coarse" else logits
    draws = [Draw(request_with(**RULES[i % len(RULES)], seed=i % 7), i) for i in range(len(logits))]
    expected = torch.tensor(
        [
            drawn_plainly(row, draw) if draw.request.temperature else int(row.argmax())
            for row, draw in zip(logits, draws, strict=True)
        ]
    )
    found = sample(logits.to(device), draws)
    assert (found.cpu() != expected).sum() <= 1
    alone = torch.cat([sample(logits[i : i + 1].to(device), draws[i : i + 1]) for i in range(0, len(draws), 5)])
    assert (alone != found[::5]).sum() <= 1
