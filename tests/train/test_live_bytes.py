"""What the plan says that a step takes is what its tensors take: counted on a CPU, measured on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tenon.adapters.bank import AdapterBank
from tenon.data.pack import PackRow
from tenon.models.decoder import Decoder
from tenon.plan.activations import Activations, Pass, adapted, attention_room
from tenon.plan.values import LEVELS, Frozen, Keeping, Level
from tenon.train.memory import layer_keeps
from tenon.train.step import StepOptions, accumulate_window
from tests.tiny import CPU, random_slot, slot_shape, tiny_decoder, tiny_facts

from .live_bytes import LiveBytes

# Of an 8B base's proportions.
FACTS = tiny_facts(layers=6).model_copy(
    update={"hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "feed_forward": 224, "vocab": 500}
)
RANK = 4


def rows_of(lengths: list[int], vocab: int) -> list[PackRow]:
    draw = np.random.default_rng(0)
    return [
        PackRow(0, draw.integers(1, vocab, length), np.ones(length, dtype=bool), index)
        for index, length in enumerate(lengths)
    ]


def spread(level: Level, layers: int, level_layers: int) -> Keeping:
    """So many of the lowest layers at one level, the rest at the first."""
    counts = [layers - level_layers, 0, 0, 0]
    counts[LEVELS.index(level)] += level_layers
    return Keeping(
        micro_tokens=100_000,
        all_layers=counts[0],
        most_layers=counts[1],
        input_layers=counts[2],
        host_layers=counts[3],
    )


@pytest.mark.parametrize("level_layers", [6, 3])
@pytest.mark.parametrize("level", ["all", "most", "input"])
def test_the_plan_counts_every_tensor_of_a_step(level: Level, level_layers: int) -> None:
    """Rows of unequal lengths, which attention gathers; of everything that torch makes, within 3%."""
    decoder, keeping = tiny_decoder(FACTS), spread(level, FACTS.layers, level_layers)
    bank = AdapterBank(FACTS, dtype=decoder.dtype, device=CPU)
    shape = slot_shape(FACTS, rank=RANK)
    random_slot(bank, shape, 0)
    rows = rows_of([60, 70, 80, 90, 56], FACTS.vocab)
    options = StepOptions(100_000, share_prefix=False, keep=layer_keeps(keeping, FACTS.layers))
    accumulate_window(decoder, bank, rows, options)  # tables that stay are made the first time
    with LiveBytes() as live:
        accumulate_window(decoder, bank, rows, options)
    slots = adapted([{site: at.rank for site, at in shape.sites.items()}], dropout=False)
    predicted = Activations(Pass(FACTS, slots, "cpu", "fp32", Frozen()), 356).peak_bytes(keeping.counts)
    assert live.peak == pytest.approx(predicted, rel=0.03)


@pytest.mark.gpu
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("frozen", [Frozen(), Frozen(format="fp8", fp8_compute=True), Frozen(format="nf4")])
def test_the_peak_on_a_gpu(level: Level, frozen: Frozen) -> None:
    facts = FACTS.model_copy(
        update={
            "layers": 12,
            "hidden": 1024,
            "heads": 16,
            "kv_heads": 4,
            "head_dim": 64,
            "feed_forward": 3584,
            "vocab": 32_000,
            "context_tokens": 4096,
            "rotary_layers": (True,) * 12,
            "window_layers": (0,) * 12,
        }
    )
    device, keeping = torch.device("cuda"), spread(level, 12, 12)
    decoder = Decoder(
        facts,
        dtype=torch.bfloat16,
        device=device,
        kind=frozen.format,
        compute_fp8=frozen.fp8_compute,
        fp8_twice=frozen.fp8_twice,
        ride_rank=16,
    )
    for place in decoder.places().values():
        place.put(torch.randn(place.shape, device=device) * 0.02)
    bank = AdapterBank(facts, dtype=torch.bfloat16, device=device)
    shape = slot_shape(facts, rank=16)
    random_slot(bank, shape, 0)
    rows = rows_of([2000, 2048, 2100, 2044], facts.vocab)
    options = StepOptions(100_000, share_prefix=False, keep=layer_keeps(keeping, 12))
    accumulate_window(decoder, bank, rows, options)
    torch.cuda.synchronize()
    # The plan counts what cuBLAS takes for itself with a step: it has to be taken anew.
    torch._C._cuda_clearCublasWorkspaces()  # pyright: ignore[reportPrivateUsage]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    accumulate_window(decoder, bank, rows, options)
    taken = torch.cuda.max_memory_allocated() - before
    slots = adapted([{site: at.rank for site, at in shape.sites.items()}], dropout=False)
    # No more room for attention than it needs, in whatever kernel this GPU has.
    room = attention_room(32, torch.cuda.get_device_capability(device))
    of = Pass(facts, slots, "cuda", "bf16", frozen, attention_bytes=room, longest_tokens=2100)
    predicted = Activations(of, 8192).peak_bytes(keeping.counts)
    assert taken == pytest.approx(predicted, rel=0.10)
