"""The decoder: one forward pass for every family, over packed tokens, with the adapters of any slots.

Families differ in a few facts (biases, query/key norms, layers without rotation, windows), which are data: see
`bases.facts.ModelFacts`. Weights that share an input are stored stacked, so that q, k, v are one product and gate, up
one.

Shape legend: T tokens, L labelled tokens, D hidden, H query heads, K key/value heads, E head dimension, F feed-forward,
V vocabulary, O outputs of a stacked weight. This module does not know losses, text, files, or how adapters are stored.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tenon.bases.facts import MODULE_PATHS, ModelFacts
from tenon.batch import Batch
from tenon.errors import BaseModelError
from tenon.kernels.lora_linear import LoraPart, lora_linear
from tenon.kernels.rms_norm import rms_norm
from tenon.kernels.rotary import rotary
from tenon.kernels.swiglu import swiglu
from tenon.models.attention import Attention, PackedAttention
from tenon.models.rope import rotary_tables

# Modules that share an input are one stacked weight, in this order of outputs.
STACKS: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


class Bank(Protocol):
    """What the decoder asks of the adapters: the parts of each stacked weight for a batch, and a gradient anchor."""

    @property
    def anchor(self) -> Tensor | None:
        """A tensor that requires a gradient while slots are trained; None otherwise."""
        ...

    def parts(self, layer: int, stack: str, batch: Batch) -> tuple[LoraPart, ...]:
        """The low-rank additions at one stacked weight, one for each segment whose slot adapts it."""
        ...


@dataclass(slots=True)
class Linear:
    """One stacked weight (O, D) with its bias, frozen."""

    weight_OD: Tensor
    bias_O: Tensor | None


@dataclass(slots=True)
class Layer:
    """The frozen weights of one decoder layer; q_norm and k_norm (E) only where the family has them."""

    input_norm_D: Tensor
    post_norm_D: Tensor
    stacks: dict[str, Linear]
    q_norm_E: Tensor | None
    k_norm_E: Tensor | None


class Decoder:
    """A frozen decoder-only transformer. Weights are set once by `load_tensors` and never change."""

    def __init__(self, facts: ModelFacts, *, dtype: torch.dtype, device: torch.device) -> None:
        """Allocates the weights, uninitialised; fill them with `load_tensors`."""
        self.facts, self.dtype, self.device = facts, dtype, device
        self.embedding_VD = self._empty(facts.vocab, facts.hidden)
        self.head_VD = self.embedding_VD if facts.tied_head else self._empty(facts.vocab, facts.hidden)
        self.final_norm_D = self._empty(facts.hidden)
        self.layers = [self._empty_layer() for _ in range(facts.layers)]
        self._tables = rotary_tables(facts.rope, facts.head_dim, 0, device)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _empty_layer(self) -> Layer:
        facts = self.facts
        biased = {"qkv": facts.qkv_bias, "o": facts.output_bias, "gate_up": facts.mlp_bias, "down": facts.mlp_bias}
        stacks: dict[str, Linear] = {}
        for stack, modules in STACKS.items():
            outs = sum(facts.linear_shape(m)[0] for m in modules)
            weight = self._empty(outs, facts.linear_shape(modules[0])[1])
            stacks[stack] = Linear(weight, self._empty(outs) if biased[stack] else None)
        norm = facts.head_dim if facts.qk_norm else None
        return Layer(
            input_norm_D=self._empty(facts.hidden),
            post_norm_D=self._empty(facts.hidden),
            stacks=stacks,
            q_norm_E=None if norm is None else self._empty(norm),
            k_norm_E=None if norm is None else self._empty(norm),
        )

    # ---- weights in and out -------------------------------------------------------------------------------------

    def named_tensors(self) -> dict[str, Tensor]:
        """Every weight by its name in the files of transformers; modules of a stack are views of it."""
        named = {"model.embed_tokens.weight": self.embedding_VD, "model.norm.weight": self.final_norm_D}
        if not self.facts.tied_head:
            named["lm_head.weight"] = self.head_VD
        for i, layer in enumerate(self.layers):
            named |= {f"model.layers.{i}.{name}": tensor for name, tensor in _layer_tensors(layer, self.facts)}
        return named

    def load_tensors(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy named tensors in, strictly: each exactly once, with its shape.

        Raises BaseModelError base-tensor-unexpected, base-tensor-shape or base-tensor-missing, naming the tensor.
        """
        wanted = self.named_tensors()
        ignored = {"lm_head.weight"} if self.facts.tied_head else set()
        for name, tensor in tensors:
            if name in ignored or name.endswith("rotary_emb.inv_freq"):
                continue
            target = wanted.pop(name, None)
            if target is None:
                raise BaseModelError(
                    "base-tensor-unexpected",
                    f"the base holds a tensor that its architecture ({self.facts.family}) does not have: {name}",
                    hint="the files and config.json do not belong together; download the base again",
                )
            if target.shape != tensor.shape:
                raise BaseModelError(
                    "base-tensor-shape",
                    f"tensor {name} does not have the shape that config.json asks for, {list(target.shape)}",
                    got=str(list(tensor.shape)),
                    hint="the files and config.json do not belong together; download the base again",
                )
            target.copy_(tensor)
        if wanted:
            names = sorted(wanted)
            raise BaseModelError(
                "base-tensor-missing",
                f"the base lacks {len(names)} of its tensors, the first is {names[0]}",
                hint="the download is incomplete; download the base again",
            )

    def linear(self, layer: int, module: str) -> Tensor:
        """The frozen weight (out, in) of one module, a view of its stack."""
        return self.named_tensors()[f"model.layers.{layer}.{MODULE_PATHS[module]}.weight"]

    # ---- the forward pass ---------------------------------------------------------------------------------------

    def forward(
        self, batch: Batch, bank: Bank | None = None, attention: Attention | None = None, *, recompute: bool = False
    ) -> Tensor:
        """Hidden states (T, D) after the final norm.

        bank: adapters of the batch's slots; None runs the bare base for every row.
        attention: a cache's view of the pass; None attends within the batch.
        recompute: keep only each layer's input and compute the layer again in the backward (less memory, more time).
        """
        attention = attention or PackedAttention(batch.attention)
        rotation = self._rotation(batch.positions_T)
        x_TD = functional.embedding(batch.ids_T, self.embedding_VD)
        for i in range(self.facts.layers):
            if recompute and torch.is_grad_enabled():
                x_TD = checkpoint(
                    self._layer,
                    i,
                    x_TD,
                    rotation,
                    batch,
                    bank,
                    attention,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                x_TD = self._layer(i, x_TD, rotation, batch, bank, attention)
        return rms_norm(x_TD, self.final_norm_D, self.facts.norm_eps)

    def logits(self, hidden_LD: Tensor) -> Tensor:
        """(L, V) scores of the next token, for the hidden states that need them."""
        return functional.linear(hidden_LD, self.head_VD)

    def _rotation(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (T, E) in the decoder's dtype, from fp32 tables that grow as rows get longer."""
        longest = int(positions_T.max()) + 1 if positions_T.numel() else 1
        if longest > self._tables[0].shape[0]:
            length = max(longest, 2 * self._tables[0].shape[0], 256)
            self._tables = rotary_tables(self.facts.rope, self.facts.head_dim, length, self.device)
        cos_LE, sin_LE = self._tables
        return cos_LE[positions_T].to(self.dtype), sin_LE[positions_T].to(self.dtype)

    def _layer(
        self,
        index: int,
        x_TD: Tensor,
        rotation: tuple[Tensor, Tensor],
        batch: Batch,
        bank: Bank | None,
        attention: Attention,
    ) -> Tensor:
        layer, eps = self.layers[index], self.facts.norm_eps

        def linear(stack: str, x: Tensor) -> Tensor:
            parts = () if bank is None else bank.parts(index, stack, batch)
            weights = layer.stacks[stack]
            return lora_linear(x, weights.weight_OD, weights.bias_O, parts, None if bank is None else bank.anchor)

        q_THE, k_TKE, v_TKE = self._heads(index, linear("qkv", rms_norm(x_TD, layer.input_norm_D, eps)), rotation)
        attended_THE = attention.attend(
            index, q_THE, k_TKE, v_TKE, scale=self.facts.head_dim**-0.5, window=self.facts.window_layers[index]
        )
        x_TD = x_TD + linear("o", attended_THE.flatten(1))
        gate_up_TF2 = linear("gate_up", rms_norm(x_TD, layer.post_norm_D, eps))
        return x_TD + linear("down", swiglu(gate_up_TF2))

    def _heads(self, index: int, qkv_TO: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Split the stacked projection into heads, normalise and rotate queries and keys."""
        facts, layer = self.facts, self.layers[index]
        heads_TXE = qkv_TO.view(qkv_TO.shape[0], -1, facts.head_dim)
        q_THE, k_TKE, v_TKE = heads_TXE.split([facts.heads, facts.kv_heads, facts.kv_heads], dim=1)
        if layer.q_norm_E is not None and layer.k_norm_E is not None:
            q_THE = rms_norm(q_THE, layer.q_norm_E, facts.norm_eps)
            k_TKE = rms_norm(k_TKE, layer.k_norm_E, facts.norm_eps)
        if facts.rotary_layers[index]:
            q_THE, k_TKE = rotary(q_THE, *rotation), rotary(k_TKE, *rotation)
        return q_THE, k_TKE, v_TKE


def _layer_tensors(layer: Layer, facts: ModelFacts) -> Iterable[tuple[str, Tensor]]:
    """(name inside the layer, tensor) of one layer; the modules of a stack as views."""
    yield "input_layernorm.weight", layer.input_norm_D
    yield "post_attention_layernorm.weight", layer.post_norm_D
    if layer.q_norm_E is not None and layer.k_norm_E is not None:
        yield "self_attn.q_norm.weight", layer.q_norm_E
        yield "self_attn.k_norm.weight", layer.k_norm_E
    for stack, modules in STACKS.items():
        linear, start = layer.stacks[stack], 0
        for module in modules:
            stop = start + facts.linear_shape(module)[0]
            yield f"{MODULE_PATHS[module]}.weight", linear.weight_OD[start:stop]
            if linear.bias_O is not None:
                yield f"{MODULE_PATHS[module]}.bias", linear.bias_O[start:stop]
            start = stop
