"""Our step and optimiser over given windows, without run folders: what the oracle is held against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from tenon.adapters.bank import AdapterBank
from tenon.adapters.peft_files import write_adapter
from tenon.data.pack import PackRow
from tenon.models.decoder import Decoder
from tenon.plan.values import OptimizerPlan
from tenon.train.optimizers import SlotOptimizer
from tenon.train.step import StepOptions, accumulate_window


def train_slots(
    decoder: Decoder,
    bank: AdapterBank,
    windows: Sequence[Sequence[PackRow]],
    plans: dict[int, OptimizerPlan],
    factors: Sequence[float],
    *,
    micro_tokens: int = 4096,
) -> dict[int, list[float]]:
    """One optimiser step for each window (rows of any slots); the losses of every slot."""
    optimizers = {number: SlotOptimizer(bank.slots[number], plan) for number, plan in plans.items()}
    losses: dict[int, list[float]] = {number: [] for number in plans}
    for window, factor in zip(windows, factors, strict=True):
        for number, found in accumulate_window(decoder, bank, window, StepOptions(micro_tokens, True)).items():
            losses[number].append(found.loss)
            optimizers[number].clip()
            optimizers[number].step(factor)
    return losses


def peft_tensors(bank: AdapterBank, number: int, folder: Path) -> dict[str, torch.Tensor]:
    """A slot's matrices as PEFT names them, by way of its files."""
    from safetensors.torch import load_file

    folder.mkdir(parents=True, exist_ok=True)
    write_adapter(folder, bank.slots[number], base="base")
    return load_file(folder / "adapter_model.safetensors")


def optimizer_plan(lr: float = 1e-3) -> OptimizerPlan:
    """AdamW as a recipe would have it."""
    return OptimizerPlan(
        kind="adamw", lr=lr, b_ratio=1.0, weight_decay=0.01, beta1=0.9, beta2=0.999, eps=1e-8, momentum=0, clip_norm=1.0
    )
