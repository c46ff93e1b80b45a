"""The oracle of training: PEFT and a loop that any textbook would write. Rows one at a time, no packing, no tricks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from torch.nn import functional
from transformers import AutoModelForCausalLM

from tenon.data.pack import PackRow
from tenon.plan.values import OptimizerPlan


@dataclass(frozen=True, slots=True)
class Trained:
    """Loss of every step, and the adapter at the end: PEFT's tensor name -> tensor."""

    losses: list[float]
    tensors: dict[str, torch.Tensor]


def train_with_peft(
    base: Path, adapter: Path, windows: Sequence[Sequence[PackRow]], plan: OptimizerPlan, factors: Sequence[float]
) -> Trained:
    """Train the adapter in `adapter` (PEFT files) over the windows, one optimiser step each."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=plan.lr, betas=(plan.beta1, plan.beta2), eps=plan.eps, weight_decay=plan.weight_decay
    )
    losses = []
    for window, factor in zip(windows, factors, strict=True):
        count = sum(int(np.count_nonzero(row.supervised[1:])) for row in window)
        total = 0.0
        for row in window:
            ids = torch.from_numpy(row.ids.astype(np.int64))[None]
            logits = model(input_ids=ids).logits[0, :-1]
            labels = torch.where(torch.from_numpy(row.supervised[1:]), ids[0, 1:], -100)
            loss = functional.cross_entropy(logits, labels, reduction="sum") / count
            loss.backward()
            total += loss.item()
        if plan.clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, plan.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * factor
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    tensors = {
        name.replace(".default", ""): p.detach().clone() for name, p in model.named_parameters() if p.requires_grad
    }
    return Trained(losses, tensors)
