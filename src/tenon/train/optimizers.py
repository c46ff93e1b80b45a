"""Optimisers over one slot's flat parameters: two groups, the A matrices and the B matrices.

The update rules are torch's own (fused AdamW, SGD) or bitsandbytes' 8-bit AdamW; a slot's whole state is a few flat
tensors. Shape legend: P parameters of a slot. This module does not know schedules, losses or files.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tenon.adapters.bank import Slot
from tenon.errors import PlanError
from tenon.plan.values import OptimizerPlan

# Tensors of a state that have an element for each parameter.
_LIKE_PARAMETERS = {"exp_avg", "exp_avg_sq", "momentum_buffer", "state1", "state2"}


class SlotOptimizer:
    """Clips and applies a slot's flat gradient, `gradients_P`."""

    def __init__(self, slot: Slot, plan: OptimizerPlan) -> None:
        """Raises ValueError for a slot without gradients, PlanError plan-optimizer-missing without bitsandbytes."""
        if slot.gradients_P is None:
            raise ValueError(f"slot {slot.name} is not trained")
        self._slot, self._plan, self.gradients_P = slot, plan, slot.gradients_P
        cut = slot.a_parameters
        halves = [slot.parameters_P[:cut], slot.parameters_P[cut:]]
        for half, gradient in zip(halves, [self.gradients_P[:cut], self.gradients_P[cut:]], strict=True):
            half.grad = gradient
        self._optimizer = _make(plan, [{"params": [half]} for half in halves])

    def zero(self) -> None:
        """Forget the gradient."""
        self.gradients_P.zero_()

    def is_finite(self) -> bool:
        """Whether no element of the gradient is NaN or infinite."""
        return bool(torch.isfinite(self.gradients_P).all())

    def unscale(self, scale: float) -> None:
        """Take a loss scale out of the gradient."""
        self.gradients_P.mul_(1.0 / scale)

    def clip(self) -> float:
        """Scale the gradient down to the plan's norm; returns the norm before. NaN and infinity come back as they
        are.
        """
        norm = float(torch.linalg.vector_norm(self.gradients_P))
        limit = self._plan.clip_norm
        if 0.0 < limit < norm < float("inf"):
            self.gradients_P.mul_(limit / (norm + 1e-6))
        return norm

    def step(self, factor: float) -> None:
        """One update with the learning rates times `factor`; the gradient is zero afterwards."""
        a, b = self._optimizer.param_groups
        a["lr"], b["lr"] = self._plan.lr * factor, self._plan.lr * self._plan.b_ratio * factor
        self._optimizer.step()
        if self._plan.kind == "adamw8bit":
            # Its moments are rounded to codes, zero not always to that of zero.
            self._slot.clear_filling()
        self.gradients_P.zero_()
        self._slot.refresh()

    def state(self) -> dict[str, Tensor]:
        """Every tensor of the optimiser's state, by a flat name: `a.exp_avg`, `b.step`, …"""
        named = {}
        for name, half in zip("ab", self._halves(), strict=True):
            for key, value in self._optimizer.state.get(half, {}).items():
                if isinstance(value, Tensor):
                    named[f"{name}.{key}"] = value
                elif isinstance(value, int):
                    # bitsandbytes counts its steps in a plain integer; no tensor of any state is a whole number alone.
                    named[f"{name}.{key}"] = torch.tensor(value)
        return named

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take up a state that `state` gave. Raises ValueError for one of a slot of another size."""
        for name, half in zip("ab", self._halves(), strict=True):
            own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            for key in _LIKE_PARAMETERS & set(own):
                if own[key].shape != half.shape:
                    raise ValueError(f"{name}.{key} has {own[key].numel()} elements, the slot {half.numel()}")
            if own:
                # torch's fused AdamW keeps its step count beside the parameters; other tensors follow them too.
                self._optimizer.state[half] = {k: _restored(v, half.device) for k, v in own.items()}

    def _halves(self) -> list[Tensor]:
        return [group["params"][0] for group in self._optimizer.param_groups]


def _restored(value: Tensor, device: torch.device) -> Tensor | int:
    whole = value.ndim == 0 and value.dtype == torch.int64
    return int(value) if whole else value.to(device).clone()


def _make(plan: OptimizerPlan, groups: list[dict[str, list[Tensor]]]) -> torch.optim.Optimizer:
    if plan.kind == "sgd":
        return torch.optim.SGD(groups, lr=plan.lr, momentum=plan.momentum, weight_decay=plan.weight_decay)
    betas = (plan.beta1, plan.beta2)
    if plan.kind == "adamw":
        return torch.optim.AdamW(
            groups, lr=plan.lr, betas=betas, eps=plan.eps, weight_decay=plan.weight_decay, fused=True
        )
    try:
        from bitsandbytes.optim.adamw import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise PlanError(
            "plan-optimizer-missing",
            "optimizer.kind adamw8bit needs the package bitsandbytes, which is not installed",
            hint="pip install bitsandbytes, or set optimizer.kind: adamw",
        ) from error
    return AdamW8bit(groups, lr=plan.lr, betas=betas, eps=plan.eps, weight_decay=plan.weight_decay)
