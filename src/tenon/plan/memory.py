"""A first estimate of memory, term by term, before anything is loaded. Rough: the allocator's own losses are a guess.

Shape legend: T tokens at once, D hidden, H query heads, K key/value heads, E head dimension, F feed-forward, R rank.
Pure: knows no tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tenon.bases.facts import ModelFacts, parse_site
from tenon.plan.values import LoraPlan, OptimizerPlan, Precision

PRECISION_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
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
    """What memory depends on, beside the base and the slots."""

    device: str
    precision: Precision
    tokens_at_once: int
    recompute: bool


@dataclass(frozen=True, slots=True)
class MemoryTerm:
    """One part of the estimate."""

    what: str
    size_bytes: int


def adapter_parameters(facts: ModelFacts, lora: LoraPlan) -> int:
    """Trainable parameters of one slot: R (in + out) for each matrix."""
    return sum(lora.rank * sum(facts.linear_shape(parse_site(site)[1])) for site in lora.sites)


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
        MemoryTerm("base", facts.parameters * width),
        MemoryTerm("adapters, gradients, optimiser", adapters),
        MemoryTerm("activations", per_token * shape.tokens_at_once),
        MemoryTerm("logits", LOGITS_BYTES),
        MemoryTerm("process", PROCESS_BYTES[shape.device]),
    )


def _state_bytes(optimizer: OptimizerPlan) -> int:
    return 4 if optimizer.kind == "sgd" and optimizer.momentum else STATE_BYTES[optimizer.kind]
