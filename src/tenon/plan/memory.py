"""What a run holds as long as it trains: base, adapters, the process. `activations` has what a step needs beside.

Shape legend: R rank. Pure: knows no tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tenon.bases.facts import STACKS, ModelFacts, parse_site
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
# Borders have room for whole sixteens of ranks, and rows begin at whole lines of 64 elements.
_BORDER_RANKS, _LINE = 16, 64
# Ranks are stored in multiples of this: kernels.low_rank.RANK_STEP.
_RANK_STEP = 8
# Share of what may be used that a plan may fill; the rest is fragmentation and the operating system.
USABLE_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class MemoryTerm:
    """One part of the estimate."""

    what: str
    size_bytes: int


def adapter_parameters(facts: ModelFacts, lora: LoraPlan) -> int:
    """Trainable parameters of one slot: R (in + out) for each matrix."""
    return sum(lora.rank * sum(facts.linear_shape(parse_site(site)[1])) for site in lora.sites)


def stored_rank(rank: int) -> int:
    """The rank that matrices are stored with: see `adapters.bank`."""
    return _multiple(rank, _RANK_STEP)


def stored_parameters(facts: ModelFacts, lora: LoraPlan) -> int:
    """Elements of one slot as it lies in memory, with the zeros that fill its ranks up."""
    return adapter_parameters(facts, lora) // lora.rank * stored_rank(lora.rank)


def gradient_bytes(facts: ModelFacts, lora: LoraPlan) -> int:
    """The gradient of one slot, fp32."""
    return 4 * stored_parameters(facts, lora)


def checkpoint_bytes(facts: ModelFacts, lora: LoraPlan, optimizer: OptimizerPlan) -> int:
    """Adapter and optimiser state of one slot on disk."""
    state = stored_parameters(facts, lora) * state_bytes(optimizer)
    return 4 * adapter_parameters(facts, lora) + state + 100_000


def trained_layers(facts: ModelFacts, lora: LoraPlan) -> int:
    """Layers that the gradient passes: from the first adapted one on."""
    return facts.layers - min(parse_site(site)[0] for site in lora.sites)


def stack_shapes(facts: ModelFacts) -> tuple[tuple[int, int], ...]:
    """(out, in) of the frozen matrices as they are multiplied: q, k, v stacked; o; gate, up stacked; down."""
    return tuple(facts.stack_shape(stack) for stack in STACKS)


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


def border_bytes(facts: ModelFacts, precision: Precision, rank: int) -> int:
    """What the borders take in which one slot rides: see `models.frozen.DenseLinear`."""
    more = 0
    for stack, modules in STACKS.items():
        outputs, inputs = facts.stack_shape(stack)
        border = _multiple(len(modules) * stored_rank(rank), _BORDER_RANKS)
        more += (outputs + border) * _multiple(inputs + border, _LINE) - outputs * inputs
    return more * facts.layers * PRECISION_BYTES[precision]


def resident_terms(
    facts: ModelFacts,
    slots: Sequence[tuple[LoraPlan, OptimizerPlan]],
    *,
    device: str,
    precision: Precision,
    frozen: Frozen,
    shards: int = 1,
) -> tuple[MemoryTerm, ...]:
    """What a run holds as long as it trains, beside what a step needs (`activations`). shards: see `base_bytes`."""
    base = base_bytes(facts, precision, frozen, shards)
    if device == "cuda" and precision != "fp32" and frozen.format == "dense" and shards == len(slots) == 1:
        base += border_bytes(facts, precision, slots[0][0].rank)
    shadow = 0 if precision == "fp32" else PRECISION_BYTES[precision]
    adapters = sum(
        stored_parameters(facts, lora) * (4 + 4 + state_bytes(optimizer) + shadow) for lora, optimizer in slots
    )
    return (
        MemoryTerm("base" if shards == 1 else f"1/{shards} of the base", base),
        MemoryTerm("adapters, gradients, optimiser", adapters),
        MemoryTerm("process", PROCESS_BYTES[device]),
    )


def state_bytes(optimizer: OptimizerPlan) -> int:
    """What an optimiser keeps of a parameter."""
    return 4 if optimizer.kind == "sgd" and optimizer.momentum else STATE_BYTES[optimizer.kind]


def _multiple(count: int, of: int) -> int:
    return -(-count // of) * of
