"""Rotary tables: frequencies and factors equal those of transformers for every kind."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tenon.bases.facts import RopeFacts
from tenon.models.rope import inverse_frequencies, rotary_tables

LLAMA3 = RopeFacts(
    kind="llama3",
    theta=500_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_context_tokens=8192,
)
YARN = RopeFacts(kind="yarn", theta=1_000_000.0, factor=4.0, original_context_tokens=32_768)
CASES = {
    "default": RopeFacts(theta=10_000.0),
    "default-high-theta": RopeFacts(theta=1_000_000.0),
    "linear": RopeFacts(kind="linear", theta=10_000.0, factor=4.0),
    "llama3": LLAMA3,
    "llama3-factor-32": LLAMA3.model_copy(update={"factor": 32.0}),
    "llama3-short": LLAMA3.model_copy(update={"original_context_tokens": 64, "theta": 100.0}),
    "yarn": YARN,
    "yarn-untruncated": YARN.model_copy(update={"truncate": False}),
    "yarn-attention-factor": YARN.model_copy(update={"attention_factor": 0.75}),
    "yarn-mscale": YARN.model_copy(update={"mscale": 0.707, "mscale_all_dim": 1.1}),
    "yarn-betas": YARN.model_copy(update={"beta_fast": 16.0, "beta_slow": 2.0}),
    "yarn-no-ramp": YARN.model_copy(update={"original_context_tokens": 4, "theta": 10.0}),
}


def reference_config(rope: RopeFacts, head_dim: int) -> LlamaConfig:
    parameters: dict[str, object] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        parameters["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = rope.original_context_tokens
    if rope.kind == "llama3":
        parameters |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        parameters |= {
            "attention_factor": rope.attention_factor,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "mscale": rope.mscale,
            "mscale_all_dim": rope.mscale_all_dim,
            "truncate": rope.truncate,
        }
    return LlamaConfig(hidden_size=head_dim * 2, num_attention_heads=2, head_dim=head_dim, rope_parameters=parameters)


@pytest.mark.parametrize("head_dim", [2, 16, 64, 128])
@pytest.mark.parametrize("case", CASES)
def test_frequencies_equal_transformers(case: str, head_dim: int) -> None:
    rope = CASES[case]
    config = reference_config(rope, head_dim)
    if rope.kind == "default":
        expected, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[rope.kind](config)
    got, got_factor = inverse_frequencies(rope, head_dim)
    assert got.shape == (head_dim // 2,) and got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert got_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_tables_equal_transformers(case: str) -> None:
    rope, head_dim, length = CASES[case], 64, 700
    reference = LlamaRotaryEmbedding(reference_config(rope, head_dim))
    cos, sin = reference(torch.zeros(1, dtype=torch.float32), torch.arange(length)[None])
    cos_LE, sin_LE = rotary_tables(rope, head_dim, length, torch.device("cpu"))
    assert cos_LE.shape == (length, head_dim) and cos_LE.dtype == torch.float32
    torch.testing.assert_close(cos_LE, cos[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(sin_LE, sin[0], rtol=0, atol=1e-5)


def test_the_kinds_differ() -> None:
    seen = {tuple(inverse_frequencies(rope, 64)[0].tolist()) for rope in CASES.values()}
    # attention factor and mscale change the factor alone
    assert len(seen) == len(CASES) - 2


def test_a_longer_table_begins_with_the_shorter() -> None:
    short, _ = rotary_tables(YARN, 16, 8, torch.device("cpu"))
    long, _ = rotary_tables(YARN, 16, 20, torch.device("cpu"))
    assert torch.equal(long[:8], short)
