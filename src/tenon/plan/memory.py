"""A first estimate of memory, term by term, before anything is loaded. Rough: the allocator's own losses are a guess.

Shape legend: T tokens at once, D hidden, H query heads, K key/value heads, E head dimension, F feed-forward, R rank.
Pure: knows no tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tenon.bases.facts import ModelFacts, parse_site
from tenon.plan.values import Frozen, LoraPlan, OptimizerPlan, Precision

PRECISION_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
# nf4: half a byte, a byte for 64 absmax codes, four for 256 of these. A scale a row is left out.
FORMAT_BYTES = {"fp8": 1.0, "int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
# What plain torch needs beside a weight that it dequantises: indices, values and absmax in four bytes each.
PLAIN_DEQUANTISED_BYTES = 16
# Adapter weights, gradients and both moments are fp32; 8-bit Adam keeps one byte a moment.
STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "sgd": 0}
# The process itself: Python and torch, or the CUDA context and its libraries.
PROCESS_BYTES = {"cpu": 600_000_000, "cuda": 1_200_000_000}
# One chunk of logits and its gradient, fp32.
LOGITS_BYTES = 2 * 128 * 1024 * 1024
# Share of what may be used that a plan may fill; the rest is fragmentation and the operating system.
USABLE_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Shape:
    """What memory depends on, beside the base and the slots. shards: devices that the base is spread over."""

    device: str
    precision: Precision
    tokens_at_once: int
    recompute: bool
    frozen: Frozen
    shards: int = 1


@dataclass(frozen=True, slots=True)
class MemoryTerm:
    """One part of the estimate."""

    what: str
    size_bytes: int


def adapter_parameters(facts: ModelFacts, lora: LoraPlan) -> int:
    """Trainable parameters of one slot: R (in + out) for each matrix."""
    return sum(lora.rank * sum(facts.linear_shape(parse_site(site)[1])) for site in lora.sites)


def gradient_bytes(facts: ModelFacts, lora: LoraPlan) -> int:
    """The gradient of one slot, fp32."""
    return 4 * adapter_parameters(facts, lora)


def checkpoint_bytes(facts: ModelFacts, lora: LoraPlan, optimizer: OptimizerPlan) -> int:
    """Adapter and optimiser state of one slot on disk."""
    return adapter_parameters(facts, lora) * (4 + _state_bytes(optimizer)) + 100_000


def trained_layers(facts: ModelFacts, lora: LoraPlan) -> int:
    """Layers that the gradient passes: from the first adapted one on."""
    return facts.layers - min(parse_site(site)[0] for site in lora.sites)


def activation_bytes_per_token(
    facts: ModelFacts, sites_rank: int, precision: Precision, *, recompute: bool, layers: int
) -> int:
    """What one token leaves behind for the backward pass of the last `layers` layers.

    A layer keeps both norms' inputs and outputs (4 D), q and the attention output (2 H E), k and v (2 K E), gate, up
    and their product (3 F); and A x of each adapted matrix. With recompute: each layer's input, and one layer in full.
    """
    layer = 4 * facts.hidden + 2 * facts.heads * facts.head_dim + 2 * facts.kv_heads * facts.head_dim
    layer += 3 * facts.feed_forward
    kept = layers * facts.hidden + layer + sites_rank / layers if recompute else layers * layer + sites_rank
    # The backward pass holds the gradients of one layer's widest tensors beside what was kept.
    return round((kept + 3 * facts.feed_forward + 2 * facts.hidden) * PRECISION_BYTES[precision])


def stack_shapes(facts: ModelFacts) -> tuple[tuple[int, int], ...]:
    """(out, in) of the frozen matrices as they are multiplied: q, k, v stacked; o; gate, up stacked; down."""
    query, kv = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
    return (
        (query + 2 * kv, facts.hidden),
        (facts.hidden, query),
        (2 * facts.feed_forward, facts.hidden),
        (facts.hidden, facts.feed_forward),
    )


def layer_bytes(facts: ModelFacts, precision: Precision, frozen: Frozen) -> int:
    """The matrices of one layer in their format."""
    weight_bytes = FORMAT_BYTES.get(frozen.format, PRECISION_BYTES[precision]) * (2 if frozen.fp8_twice else 1)
    return round(facts.linear_parameters / facts.layers * weight_bytes)


def base_bytes(facts: ModelFacts, precision: Precision, frozen: Frozen, shards: int = 1) -> int:
    """What the base keeps on one device: the linear layers in their format, all else in the precision.

    shards: devices over which the layers are spread; each has room for two whole ones, and embeddings and head whole.
    """
    one = layer_bytes(facts, precision, frozen)
    layers = facts.layers * one if shards == 1 else facts.layers * one // shards + 2 * one
    return layers + (facts.parameters - facts.linear_parameters) * PRECISION_BYTES[precision]


def dequantised_bytes(facts: ModelFacts, device: str, precision: Precision, frozen: Frozen) -> int:
    """The widest weight in the form in which it is multiplied, while it is."""
    if frozen.format == "dense" or frozen.fp8_twice:
        return 0
    weight_bytes = 1 if frozen.fp8_compute else PRECISION_BYTES[precision]
    if device == "cpu":
        weight_bytes += PLAIN_DEQUANTISED_BYTES
    return max(outputs * inputs for outputs, inputs in stack_shapes(facts)) * weight_bytes


def memory_terms(
    facts: ModelFacts, slots: Sequence[tuple[LoraPlan, OptimizerPlan]], shape: Shape
) -> tuple[MemoryTerm, ...]:
    """Every part of the estimate, largest meanings first."""
    width = PRECISION_BYTES[shape.precision]
    sites_rank = max(lora.rank * len(lora.sites) for lora, _ in slots)
    layers = max(trained_layers(facts, lora) for lora, _ in slots)
    per_token = activation_bytes_per_token(facts, sites_rank, shape.precision, recompute=shape.recompute, layers=layers)
    shadow = 0 if shape.precision == "fp32" else width
    adapters = sum(
        adapter_parameters(facts, lora) * (4 + 4 + _state_bytes(optimizer) + shadow) for lora, optimizer in slots
    )
    return (
        MemoryTerm(
            "base" if shape.shards == 1 else f"1/{shape.shards} of the base",
            base_bytes(facts, shape.precision, shape.frozen, shape.shards),
        ),
        MemoryTerm("a dequantised weight", dequantised_bytes(facts, shape.device, shape.precision, shape.frozen)),
        MemoryTerm("adapters, gradients, optimiser", adapters),
        MemoryTerm("activations", per_token * shape.tokens_at_once),
        MemoryTerm("logits", LOGITS_BYTES),
        MemoryTerm("process", PROCESS_BYTES[shape.device]),
    )


def _state_bytes(optimizer: OptimizerPlan) -> int:
    return 4 if optimizer.kind == "sgd" and optimizer.momentum else STATE_BYTES[optimizer.kind]
