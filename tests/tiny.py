"""Tiny random decoders for tests: real architecture, no meaning."""

from __future__ import annotations

import torch

from tenon.adapters.bank import AdapterBank, SiteShape, SlotShape, initialise
from tenon.bases.facts import MODULE_PATHS, ModelFacts, RopeFacts, site_name
from tenon.models.decoder import Decoder

CPU = torch.device("cpu")


def tiny_facts(*, layers: int = 3, tied: bool = True, qk_norm: bool = False, window: int = 0) -> ModelFacts:
    """Three layers of 32 features, grouped heads, 97 tokens."""
    return ModelFacts(
        family="llama",
        layers=layers,
        hidden=32,
        heads=4,
        kv_heads=2,
        head_dim=8,
        feed_forward=48,
        vocab=97,
        context_tokens=256,
        norm_eps=1e-5,
        rope=RopeFacts(),
        tied_head=tied,
        qk_norm=qk_norm,
        rotary_layers=(True,) * layers,
        window_layers=(window,) * layers,
        eos_ids=(0,),
    )


def tiny_decoder(facts: ModelFacts | None = None, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Decoder:
    """Random weights as a function of the seed."""
    decoder = Decoder(facts or tiny_facts(), dtype=dtype, device=CPU)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in decoder.named_tensors().items():
        drawn = torch.randn(tensor.shape, generator=generator) * 0.2
        tensor.copy_(1 + 0.1 * drawn if "norm" in name else drawn)
    return decoder


def slot_shape(
    facts: ModelFacts,
    *,
    rank: int = 4,
    scale: float = 2.0,
    modules: tuple[str, ...] = tuple(MODULE_PATHS),
    drop: float = 0,
) -> SlotShape:
    """The same rank at the given modules of every layer."""
    sites = {site_name(i, m): SiteShape(rank, scale) for i in range(facts.layers) for m in modules}
    return SlotShape(sites, drop)


def random_slot(bank: AdapterBank, shape: SlotShape, seed: int, *, trained: bool = True) -> int:
    """A slot whose B matrices are not zero, so that it changes what the base says."""
    number = bank.add(f"slot{seed}", shape, trained=trained)
    slot = bank.slots[number]
    initialise(slot, "kaiming", seed)
    generator = torch.Generator().manual_seed(seed)
    for _, b_OR in slot.matrices().values():
        b_OR.copy_(torch.randn(b_OR.shape, generator=generator) * 0.1)
    slot.refresh()
    return number
