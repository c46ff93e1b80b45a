"""Attention in one call, against the formula in float64."""

from __future__ import annotations

import pytest
import torch

from tenon.models.attention import fused_attention

ROWS, KV_HEADS, CONTEXTS, SIZE = 3, 2, 11, 8


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("heads", [2, 6])
def test_heads_that_share_keys_attend_by_the_formula(heads: int, queries: int, masked: bool) -> None:
    torch.manual_seed(heads)
    q_GHQE = torch.randn(ROWS, queries, heads, SIZE).transpose(1, 2)
    k_GKCE, v_GKCE = (torch.randn(ROWS, CONTEXTS, KV_HEADS, SIZE).transpose(1, 2) for _ in range(2))
    mask = None
    if masked:
        mask = torch.arange(CONTEXTS) <= torch.tensor([2, 10, 5])[:, None, None, None] + torch.zeros(queries, 1)
    found = fused_attention(q_GHQE, k_GKCE, v_GKCE, mask, scale=0.3)
    keys, values = (x.double().repeat_interleave(heads // KV_HEADS, dim=1) for x in (k_GKCE, v_GKCE))
    scores = 0.3 * q_GHQE.double() @ keys.transpose(2, 3)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    assert found.shape == q_GHQE.shape
    torch.testing.assert_close(found.double(), scores.softmax(-1) @ values, atol=1e-6, rtol=1e-5)
