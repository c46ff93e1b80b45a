"""All that the benchmarks ask of Tenon's heavy code, in one place: when its interfaces change, this file does.

A random decoder is made on the device, without files; a step is the product's own path: window, clip, update.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from benchmarks.gpu.works import BaseFormat, Shape, Spec
from tenon.adapters.bank import AdapterBank, SiteShape, SlotShape, initialise
from tenon.bases.facts import MODULE_PATHS, STACKS, ModelFacts, RopeFacts, site_name
from tenon.bases.read import folder_facts
from tenon.data.pack import PackRow
from tenon.kernels import fp8
from tenon.models.decoder import Decoder
from tenon.models.frozen import FrozenKind
from tenon.models.layer import Keep
from tenon.models.load import read_tensors
from tenon.models.shards import Sharing
from tenon.plan.activations import Pass, adapted
from tenon.plan.fit import host_room_bytes
from tenon.plan.keeping import Steps, choose_keeping, describe_use, may_keep
from tenon.plan.time import flops_per_token
from tenon.plan.values import Frozen, MachineFacts, OptimizerPlan
from tenon.ranks.group import ALONE, Ranks
from tenon.train.graph import StepGraphs
from tenon.train.memory import LIBRARY_BYTES, GpuMemory, Limits, layer_keeps, room_of, with_attention_room
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
    facts: ModelFacts,
    base: BaseFormat,
    device: torch.device,
    *,
    ride_rank: int = 0,
    shelf_rank: int = 0,
    sharing: Sharing | None = None,
) -> Decoder:
    """Random weights, made where they stay. ride_rank, shelf_rank, sharing: see `Decoder`."""
    dtype = compute_dtype(device)
    decoder = empty_decoder(facts, base, dtype, device, ride_rank=ride_rank, shelf_rank=shelf_rank, sharing=sharing)
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
    shelf_rank: int = 0,
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
        shelf_rank=shelf_rank,
        sharing=sharing,
    )


def random_products(
    shape: Shape, base: BaseFormat, tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[], object], float]:
    """(the frozen products of one layer, forward and back, on random rows; their FLOP). Every call makes them all."""
    decoder = random_decoder(facts_of(replace(shape, layers=1)), base, device)
    stacks = [decoder.layers[0].stacks[name] for name in STACKS]
    inputs = [torch.randn(tokens, linear.inputs, device=device, dtype=dtype) for linear in stacks]
    gradients = [torch.randn(tokens, linear.outputs, device=device, dtype=dtype) for linear in stacks]
    rows = [fp8.quantise_rows(x) if linear.takes_fp8 else None for linear, x in zip(stacks, inputs, strict=True)]
    back = [
        fp8.quantise_rows(dy, linear.output_scale_O) if linear.takes_fp8 else None
        for linear, dy in zip(stacks, gradients, strict=True)
    ]

    def run() -> None:
        for linear, x, dy, x8, dy8 in zip(stacks, inputs, gradients, rows, back, strict=True):
            linear.apply(x, x8)
            linear.apply_transposed(dy, dy8)

    return run, 4.0 * tokens * sum(linear.outputs * linear.inputs for linear in stacks)


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


def step_options(tokens: int, keep: tuple[Keep, ...] = ()) -> StepOptions:
    """So many tokens at once. keep: what each layer keeps, everything when it is empty."""
    return StepOptions(micro_tokens=max(1, tokens), share_prefix=True, keep=keep)


def fitted_options(decoder: Decoder, bank: AdapterBank, spec: Spec) -> StepOptions:
    """As the product chooses by the memory that the work may use, or that is free; on a CPU everything is kept."""
    row_tokens = spec.row_tokens or 512  # of banking77's rows none has as many
    step_tokens = spec.rows * row_tokens
    if decoder.device.type == "cpu":
        return step_options(step_tokens)
    sites = [{site: at.rank for site, at in slot.shape.sites.items()} for slot in bank.slots.values()]
    kind, compute_fp8 = _KINDS[spec.base]
    fp8 = kind == "fp8"
    steps = Steps(
        of=Pass(
            decoder.facts,
            adapted(sites, dropout=False),
            "cuda",
            "bf16",
            Frozen(format=kind, fp8_compute=fp8 or compute_fp8, fp8_twice=fp8),
            longest_tokens=row_tokens,
        ),
        machine=_machine(decoder.device),
        longest_tokens=row_tokens,
        step_tokens=step_tokens,
        row_tokens=row_tokens,
        token_flops=flops_per_token(decoder.facts, lora_parameters=0, row_tokens=row_tokens, supervised_share=1.0),
        levels=may_keep("auto", "cuda"),
    )
    limit = None if spec.memory_gb is None else round(spec.memory_gb * 1e9)
    memory = GpuMemory(decoder.device)
    usable = memory.held_bytes() + memory.free_bytes()
    steps = with_attention_room(steps, usable if limit is None else min(usable, limit))
    limits = Limits(limit, host_room_bytes(steps.machine))
    # AdamW makes both moments with its first step.
    coming = sum(8 * slot.parameters_P.numel() for slot in bank.slots.values())
    room = room_of(memory, limits, coming_bytes=coming, libraries_bytes=LIBRARY_BYTES)
    chosen = choose_keeping(steps, room)
    used = torch.cuda.memory_allocated(decoder.device) + coming + chosen.peak_bytes
    print(describe_use(chosen.keeping, used, limit or used), file=sys.stderr)
    keep = layer_keeps(chosen.keeping, decoder.facts.layers)
    return replace(step_options(chosen.keeping.micro_tokens, keep), attention_bytes=steps.of.attention_bytes)


def _machine(device: torch.device) -> MachineFacts:
    free, _ = torch.cuda.mem_get_info(device)
    return MachineFacts(
        device="cuda",
        device_name=torch.cuda.get_device_name(device),
        device_count=1,
        device_memory_bytes=free,
        host_memory_bytes=psutil.virtual_memory().available,
        cores=1,
        threads=1,
        bf16=True,
        free_disk_bytes=0,
        capability=torch.cuda.get_device_capability(device),
    )


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
    stepper = Stepper(decoder, bank, dict.fromkeys(bank.slots, 1e-4), fitted_options(decoder, bank, spec))

    def step(rows: Sequence[PackRow]) -> float:
        losses = stepper.gradient(rows)
        stepper.update()
        return sum(found.loss for found in losses.values()) / len(losses)

    return step
