"""What a base model is, as numbers: the decoder's configuration and the planner's input.

Shape legend: D hidden, H query heads, K key/value heads, E head dimension, F feed-forward, V vocabulary.
This module knows no tensors and no files.
"""

from __future__ import annotations

from typing import Literal

from tenon.values import Value

# The seven linear modules of a decoder layer, in the order of the forward pass, with their path inside the layer.
MODULE_PATHS: dict[str, str] = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
# Modules that share an input are one stacked weight, in this order of outputs.
STACKS: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MODULES = ("gate_proj", "up_proj", "down_proj")


class RopeFacts(Value):
    """Rotary position embedding: base frequency and how it is stretched for long contexts.

    kind: default | linear | llama3 | yarn (names of transformers' `rope_type`).
    factor … truncate: parameters of the kind, as in the model's config; unused ones keep their default.
    """

    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_tokens: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


class ModelFacts(Value):
    """The architecture of one decoder: everything that its forward pass and its memory depend on.

    family: row of the family table (llama, mistral, qwen2, qwen3, smollm3).
    rotary_layers: per layer, whether positions rotate (SmolLM3 leaves some layers without).
    window_layers: per layer, the sliding-window length in tokens, or 0 for full attention.
    bos_id, eos_ids: from the generation config; eos_ids are the stop tokens that the model itself declares.
    stored: what the files keep the linear layers in: `nf4` where bitsandbytes quantised them.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocab: int
    context_tokens: int
    norm_eps: float
    rope: RopeFacts
    tied_head: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rotary_layers: tuple[bool, ...]
    window_layers: tuple[int, ...]
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    stored: Literal["plain", "nf4"] = "plain"

    def linear_shape(self, module: str) -> tuple[int, int]:
        """(out, in) features of one of the seven linear modules."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (q, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, q),
            "gate_proj": (self.feed_forward, self.hidden),
            "up_proj": (self.feed_forward, self.hidden),
            "down_proj": (self.hidden, self.feed_forward),
        }[module]

    def stack_shape(self, stack: str) -> tuple[int, int]:
        """(out, in) features of one stacked weight."""
        shapes = [self.linear_shape(module) for module in STACKS[stack]]
        return sum(out for out, _ in shapes), shapes[0][1]

    @property
    def kept_elements(self) -> int:
        """Elements of the keys and values of one token, in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def linear_parameters(self) -> int:
        """Parameters of all linear modules of all layers (the N_lin of the FLOP count)."""
        return self.layers * sum(out * into for out, into in map(self.linear_shape, MODULE_PATHS))

    @property
    def parameters(self) -> int:
        """All parameters, tied head counted once; norms and biases included."""
        embeddings = self.vocab * self.hidden * (1 if self.tied_head else 2)
        norms = self.hidden * (2 * self.layers + 1) + (2 * self.head_dim * self.layers if self.qk_norm else 0)
        kv = self.kv_heads * self.head_dim
        biases = (self.heads * self.head_dim + 2 * kv) * self.qkv_bias + self.hidden * self.output_bias
        biases += (2 * self.feed_forward + self.hidden) * self.mlp_bias
        return embeddings + norms + self.linear_parameters + self.layers * biases


def site_name(layer: int, module: str) -> str:
    """The full name of one adapted matrix, as PEFT spells it: `layers.3.self_attn.q_proj`."""
    return f"layers.{layer}.{MODULE_PATHS[module]}"


def parse_site(name: str) -> tuple[int, str]:
    """Inverse of `site_name`: (layer, module)."""
    _, layer, _, module = name.split(".")
    return int(layer), module
