"""A small random model with the sizes that kernels like, its slots and rows: for whole steps.

Weights have the deviation 1/sqrt(inputs), so that activations keep their size: a model whose activations explode is all
rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from tenon.adapters.bank import AdapterBank
from tenon.bases.facts import ModelFacts
from tenon.data.pack import PackRow
from tenon.models.decoder import Decoder
from tenon.models.frozen import FrozenKind
from tests.tiny import random_slot, slot_shape, tiny_facts

VOCAB = 1_000


def small_facts(*, layers: int = 3, qk_norm: bool = False, window: int = 0) -> ModelFacts:
    sizes = {"hidden": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "feed_forward": 512}
    facts = tiny_facts(layers=layers, tied=False, qk_norm=qk_norm, window=window)
    return facts.model_copy(update={**sizes, "vocab": VOCAB, "context_tokens": 8192})


def weights(facts: ModelFacts, *, seed: int = 0) -> Iterable[tuple[str, Tensor]]:
    """Rounded to bf16 once, so that every decoder has the same."""
    shapes = Decoder(facts, dtype=torch.bfloat16, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in shapes.named_tensors().items():
        drawn = torch.randn(tensor.shape, generator=generator)
        value = 1 + 0.1 * drawn if "norm" in name else drawn / tensor.shape[-1] ** 0.5
        yield name, value.to(torch.bfloat16)


def small_decoder(
    facts: ModelFacts,
    dtype: torch.dtype,
    device: torch.device,
    *,
    fuse: bool,
    kind: FrozenKind = "dense",
    ride_rank: int = 0,
    shelf_rank: int = 0,
) -> Decoder:
    decoder = Decoder(
        facts, dtype=dtype, device=device, fuse=fuse, kind=kind, ride_rank=ride_rank, shelf_rank=shelf_rank
    )
    decoder.load_tensors(weights(facts))
    if not fuse:
        decoder.use_plain()
    return decoder


def small_bank(
    facts: ModelFacts,
    dtype: torch.dtype,
    device: torch.device,
    ranks: Sequence[int],
    *,
    modules: Sequence[tuple[str, ...]] | None = None,
    drop: float = 0.0,
) -> AdapterBank:
    """Slots whose matrices are numbers of bf16, whatever the dtype."""
    bank = AdapterBank(facts, dtype=dtype, device=device)
    for seed, rank in enumerate(ranks):
        shape = slot_shape(facts, rank=rank, drop=drop)
        if modules is not None:
            shape = slot_shape(facts, rank=rank, drop=drop, modules=modules[seed])
        slot = bank.slots[random_slot(bank, shape, seed)]
        slot.parameters_P.copy_(slot.parameters_P.to(torch.bfloat16))
        slot.refresh()
    return bank


def small_rows(slots: int, lengths: Sequence[int]) -> list[PackRow]:
    """Rows of these lengths for every slot, about half of the tokens labelled."""
    draw = np.random.default_rng(7)
    return [
        PackRow(slot, draw.integers(1, VOCAB, length), draw.random(length) < 0.5, index, draw=31 * slot + index)
        for slot in range(slots)
        for index, length in enumerate(lengths)
    ]
