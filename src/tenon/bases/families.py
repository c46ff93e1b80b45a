"""The table of decoder families: what config.json leaves unsaid, and how one family differs from the next.

A family is data. Everything else (the forward pass, loading, adapters) reads ModelFacts and never asks for a family's
name. This module knows no files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tenon.errors import BaseModelError

# Where a family's sliding windows lie: in no layer; in every layer when `sliding_window` is set; in the layers that
# `layer_types` names, or else those from `max_window_layers` on; or else those without rotary positions.
Windows = Literal["never", "every", "late", "unrotated"]


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the table.

    name: `model_type` of config.json. covers: for people. architecture: the class that the checkpoint names.
    gguf: architectures of GGUF files that hold this family.
    gguf_interleaved: llama.cpp stores q and k rows pair by pair there, not half by half.
    theta, tied, kv_heads, head_dim, window_tokens: what a missing key means (None: heads; hidden / heads; none).
    bias_keys: config keys that switch biases on. qkv_bias: q, k and v always have one.
    qk_norm: queries and keys are normalised per head. no_rope_interval: each such layer does not rotate (0: all do).
    """

    name: str
    covers: str
    architecture: str
    gguf: tuple[str, ...]
    gguf_interleaved: bool = False
    theta: float = 10_000.0
    tied: bool = False
    kv_heads: int | None = None
    head_dim: int | None = None
    window_tokens: int | None = None
    windows: Windows = "never"
    bias_keys: frozenset[str] = frozenset()
    qkv_bias: bool = False
    qk_norm: bool = False
    no_rope_interval: int = 0


FAMILIES: tuple[Family, ...] = (
    Family(
        name="llama",
        covers="Llama 2 and 3, SmolLM2",
        architecture="LlamaForCausalLM",
        gguf=("llama",),
        gguf_interleaved=True,
        bias_keys=frozenset({"attention_bias", "mlp_bias"}),
    ),
    Family(
        name="mistral",
        covers="Mistral 7B, Nemo, Small",
        architecture="MistralForCausalLM",
        gguf=(),
        kv_heads=8,
        windows="every",
        window_tokens=4096,
    ),
    Family(
        name="qwen2",
        covers="Qwen 2 and 2.5",
        architecture="Qwen2ForCausalLM",
        gguf=("qwen2",),
        kv_heads=32,
        windows="late",
        window_tokens=4096,
        qkv_bias=True,
    ),
    Family(
        name="qwen3",
        covers="Qwen 3, dense",
        architecture="Qwen3ForCausalLM",
        gguf=("qwen3",),
        kv_heads=32,
        head_dim=128,
        windows="late",
        window_tokens=4096,
        bias_keys=frozenset({"attention_bias"}),
        qk_norm=True,
    ),
    Family(
        name="smollm3",
        covers="SmolLM3",
        architecture="SmolLM3ForCausalLM",
        gguf=("smollm3",),
        gguf_interleaved=True,
        theta=2_000_000.0,
        tied=True,
        kv_heads=4,
        windows="unrotated",
        bias_keys=frozenset({"attention_bias", "mlp_bias"}),
        no_rope_interval=4,
    ),
)


def family_of(model_type: str, where: str) -> Family:
    """The family of a config.json. Raises BaseModelError base-unknown-architecture."""
    for family in FAMILIES:
        if family.name == model_type:
            return family
    raise _unknown(model_type, where)


def family_of_gguf(architecture: str, where: str) -> Family:
    """The family of a GGUF file. Raises BaseModelError base-unknown-architecture."""
    for family in FAMILIES:
        if architecture in family.gguf:
            return family
    raise _unknown(architecture, where)


def _unknown(architecture: str, where: str) -> BaseModelError:
    known = "; ".join(f"{family.name} ({family.covers})" for family in FAMILIES)
    return BaseModelError(
        "base-unknown-architecture",
        f"{where}: Tenon has no decoder for this architecture",
        got=architecture,
        hint=f"choose a base of a family that works: {known}",
    )
