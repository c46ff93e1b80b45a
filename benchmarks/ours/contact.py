"""All that the benchmarks ask of Tenon's heavy code, in one place: when its interfaces change, this file does.

A random decoder is made on the device, without files; a step is the product's own path: window, clip, update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.gpu.works import BaseFormat, Shape, Spec
from tenon.adapters.bank import AdapterBank, SiteShape, SlotShape, initialise
from tenon.bases.facts import MODULE_PATHS, ModelFacts, RopeFacts, site_name
from tenon.bases.read import folder_facts
from tenon.data.pack import PackRow
from tenon.models.decoder import Decoder
from tenon.models.frozen import FrozenKind
from tenon.models.load import read_tensors
from tenon.models.shards import Sharing
from tenon.plan.values import OptimizerPlan
from tenon.ranks.group import ALONE, Ranks
from tenon.train.graph import StepGraphs
from tenon.train.optimizers import SlotOptimizer
from tenon.train.step import StepOptions, WindowLoss, accumulate_window, add_up

ROPE_THETA = 500_000.0
_WEIGHT_DEVIATION = 0.02
# For each format of the base: what the linear weights are kept in, and whether nf4 is multiplied in fp8.
_KINDS: dict[BaseFormat, tuple[FrozenKind, bool]] = {
    "bf16": ("dense", False),
    "fp8": ("fp8", False),
    "nf4": ("nf4", False),
    "nf4-fp8": ("nf4", True),
}


def facts_of(shape: Shape) -> ModelFacts:
    """The facts of a benchmark's shape."""
    return ModelFacts(
        family="llama",
        layers=shape.layers,
        hidden=shape.hidden,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        feed_forward=shape.feed_forward,
        vocab=shape.vocab,
        context_tokens=131_072,
        norm_eps=1e-5,
        rope=RopeFacts(theta=ROPE_THETA),
        tied_head=shape.tied_head,
        rotary_layers=(True,) * shape.layers,
        window_layers=(0,) * shape.layers,
        eos_ids=(2,),
    )


def compute_dtype(device: torch.device) -> torch.dtype:
    """What a step computes in: bf16 on a GPU, fp32 on a CPU, which has no fast bf16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def random_decoder(
    facts: ModelFacts, base: BaseFormat, device: torch.device, *, ride_rank: int = 0, sharing: Sharing | None = None
) -> Decoder:
    """Random weights, made where they stay. ride_rank, sharing: see `Decoder`."""
    decoder = empty_decoder(facts, base, compute_dtype(device), device, ride_rank=ride_rank, sharing=sharing)
    torch.manual_seed(0)
    for name, place in decoder.places().items():
        fresh = torch.empty(place.shape, dtype=decoder.dtype, device=device)
        place.put(fresh.fill_(1.0) if "norm" in name else fresh.normal_(std=_WEIGHT_DEVIATION))
    return decoder


def folder_decoder(
    folder: Path, base: BaseFormat, dtype: torch.dtype, device: torch.device, *, ride_rank: int = 0
) -> Decoder:
    """The weights of a folder in transformers' layout. ride_rank: see `Decoder`."""
    decoder = empty_decoder(folder_facts(folder), base, dtype, device, ride_rank=ride_rank)
    decoder.load_tensors(read_tensors(folder))
    return decoder


def empty_decoder(
    facts: ModelFacts,
    base: BaseFormat,
    dtype: torch.dtype,
    device: torch.device,
    *,
    ride_rank: int = 0,
    sharing: Sharing | None = None,
) -> Decoder:
    """A decoder to be filled, its linear weights in the base's format."""
    kind, compute_fp8 = _KINDS[base]
    return Decoder(
        facts,
        dtype=dtype,
        device=device,
        kind=kind,
        compute_fp8=compute_fp8,
        ride_rank=ride_rank,
        sharing=sharing,
    )


def plain_decoder(weights: Decoder) -> Decoder:
    """The weights of a decoder as they are multiplied, in an fp32 decoder without fused kernels: the reference."""
    plain = Decoder(weights.facts, dtype=torch.float32, device=weights.device, fuse=False)
    places = plain.places()
    for name, place in weights.places().items():
        places[name].put(place.get().float())
    return plain


def make_bank(decoder: Decoder, ranks: Sequence[int], seeds: Sequence[int]) -> AdapterBank:
    """One trained slot for each rank, over all seven modules of every layer; alpha is twice the rank."""
    facts = decoder.facts
    bank = AdapterBank(facts, dtype=decoder.dtype, device=decoder.device)
    for number, (rank, seed) in enumerate(zip(ranks, seeds, strict=True)):
        sites = {site_name(i, m): SiteShape(rank, 2.0) for i in range(facts.layers) for m in MODULE_PATHS}
        bank.add(f"slot{number}", SlotShape(sites), trained=True)
        initialise(bank.slots[number], "kaiming", seed)
    return bank


def adamw(lr: float) -> OptimizerPlan:
    """AdamW as torch has it by default, with gradients clipped to 1."""
    return OptimizerPlan(
        kind="adamw", lr=lr, b_ratio=1.0, weight_decay=0.01, beta1=0.9, beta2=0.999, eps=1e-8, momentum=0, clip_norm=1.0
    )


def step_options(rows: int, row_tokens: int, memory_gb: float | None, *, recompute: bool = False) -> StepOptions:
    """How a window is cut and what is kept for its backward. memory_gb: None for all that is free.

    recompute: keep each layer's input alone.
    """
    del memory_gb  # nothing decides by it yet
    return StepOptions(micro_tokens=max(1, rows * row_tokens), share_prefix=True, recompute=recompute)


def _graphs_failed(reason: str) -> None:
    raise RuntimeError(f"no graph could be recorded: {reason}")


class Stepper:
    """Whole optimiser steps over a decoder and the slots of a bank. optimizers: by slot number."""

    def __init__(
        self,
        decoder: Decoder,
        bank: AdapterBank,
        rates: Mapping[int, float],
        options: StepOptions,
        *,
        ranks: Ranks = ALONE,
    ) -> None:
        """rates: the learning rate of each slot. ranks: who shares the steps."""
        self._decoder, self._bank, self._options, self._ranks = decoder, bank, options, ranks
        self._graphs = StepGraphs(decoder, on_failure=_graphs_failed)
        self.optimizers = {number: SlotOptimizer(bank.slots[number], adamw(lr)) for number, lr in rates.items()}

    def gradient(self, rows: Sequence[PackRow]) -> dict[int, WindowLoss]:
        """Add up the window's gradient in the slots."""
        losses = accumulate_window(
            self._decoder, self._bank, rows, self._options, graphs=self._graphs, ranks=self._ranks
        )
        return add_up(losses, [optimizer.gradients_P for optimizer in self.optimizers.values()], self._ranks)

    def update(self, factor: float = 1.0) -> None:
        """Clip and apply each slot's gradient."""
        for optimizer in self.optimizers.values():
            optimizer.clip()
            optimizer.step(factor)


def build(spec: Spec) -> Callable[[Sequence[PackRow]], float]:
    """The step of a work: takes a window of rows, returns the mean of the slots' losses."""
    device = torch.device(spec.device)
    ride_rank = spec.ranks[0] if len(spec.ranks) == 1 else 0  # as the pipeline asks for it
    if spec.weights:
        decoder = folder_decoder(Path(spec.weights), spec.base, compute_dtype(device), device, ride_rank=ride_rank)
    else:
        decoder = random_decoder(facts_of(Shape(**spec.shape)), spec.base, device, ride_rank=ride_rank)  # pyright: ignore[reportArgumentType]
    bank = make_bank(decoder, spec.ranks, range(len(spec.ranks)))
    longest = spec.row_tokens or 512  # of banking77's rows none has as many
    options = step_options(spec.rows, longest, spec.memory_gb)
    stepper = Stepper(decoder, bank, dict.fromkeys(bank.slots, 1e-4), options)

    def step(rows: Sequence[PackRow]) -> float:
        losses = stepper.gradient(rows)
        stepper.update()
        return sum(found.loss for found in losses.values()) / len(losses)

    return step
