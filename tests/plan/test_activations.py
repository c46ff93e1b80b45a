"""Bytes of a step beside base and adapters, held to peaks that were measured on a GPU."""

from __future__ import annotations

import pytest

from tenon.bases.facts import MODULE_PATHS, ModelFacts, site_name
from tenon.plan.activations import LEVELS, Activations, Adapted, Pass, adapted, adapted_by
from tenon.plan.memory import base_bytes
from tenon.plan.precision import DENSE, FP8_ONCE, FP8_TWICE, INT8
from tenon.plan.values import Frozen

from .situations import LLAMA_1B, LLAMA_8B, SMOLLM2_135M, plan_of

NF4, NF4_IN_FP8 = Frozen(format="nf4"), Frozen(format="nf4", fp8_compute=True)
# Adapter, gradient and both moments in fp32, the shadow in bf16.
STATE_BYTES = 18


def all_modules(facts: ModelFacts, *ranks: int, lowest: int = 0, dropout: bool = False) -> Adapted:
    sites = [site_name(i, module) for i in range(lowest, facts.layers) for module in MODULE_PATHS]
    return adapted([dict.fromkeys(sites, rank) for rank in ranks], dropout=dropout)


def on_gpu(facts: ModelFacts, frozen: Frozen = DENSE, *, slots: Adapted | None = None, tokens: int) -> Activations:
    return Activations(Pass(facts, slots or all_modules(facts, 16), "cuda", "bf16", frozen), tokens)


def resident_bytes(facts: ModelFacts, frozen: Frozen, rank: int) -> int:
    adapter = rank * facts.layers * sum(sum(facts.linear_shape(module)) for module in MODULE_PATHS)
    return base_bytes(facts, "bf16", frozen) + STATE_BYTES * adapter


@pytest.mark.parametrize(
    ("facts", "frozen", "tokens", "measured_gb"),
    [
        (LLAMA_8B, DENSE, 8_192, 42.5),
        (LLAMA_8B, DENSE, 16_384, 68.1),
        (LLAMA_8B, FP8_TWICE, 8_192, 42.5),
        (LLAMA_8B, NF4_IN_FP8, 8_192, 32.1),
        (LLAMA_1B, DENSE, 8_192, 10.2),
        (LLAMA_1B, DENSE, 1_024, 3.85),
    ],
)
def test_peaks_measured_on_an_h100(facts: ModelFacts, frozen: Frozen, tokens: int, measured_gb: float) -> None:
    """max_memory_allocated of a step that keeps everything: rank 16 at all modules, rows of 2,048 (1,024) tokens."""
    found = on_gpu(facts, frozen, tokens=tokens).peak_bytes((facts.layers, 0, 0, 0))
    assert (resident_bytes(facts, frozen, 16) + found) / 1e9 == pytest.approx(measured_gb, rel=0.08)


def test_what_an_8b_layer_keeps_of_a_token() -> None:
    kept = {level: value / 8192 for level, value in on_gpu(LLAMA_8B, FP8_TWICE, tokens=8192).kept.items()}
    # x, x2: 4,096 each; q, k, v: 6,144; attention's output: 4,096; gate, up: 28,672: in bf16. logsumexp in fp32.
    assert kept["all"] == 2 * (2 * 4096 + 6144 + 4096 + 28_672 + 48 + 16 + 32 + 16) + 4 * 32
    assert kept["all"] - kept["most"] == 2 * (28_672 + 32)
    assert (kept["input"], kept["host"]) == (2 * (4096 + 16), 2 * 16)
    # One slot that rides has its low-rank activations behind gate and up too, in whole lines of 64.
    assert on_gpu(LLAMA_8B, tokens=8192).kept["all"] / 8192 == kept["all"] + 2 * 64
    assert on_gpu(LLAMA_8B, tokens=1024).kept["all"] / 1024 == kept["all"]


def test_norms_of_queries_and_keys_keep_the_projection_too() -> None:
    normed = LLAMA_8B.model_copy(update={"qk_norm": True})
    more = on_gpu(normed, tokens=1024).kept["all"] - on_gpu(LLAMA_8B, tokens=1024).kept["all"]
    assert more == 1024 * 2 * 6144


def test_attention_that_gathers_its_rows_keeps_them_twice() -> None:
    """On a GPU without flash attention: q, k, v by row, and the output in both orders."""
    slots = all_modules(LLAMA_8B, 16)
    gathers = Activations(Pass(LLAMA_8B, slots, "cuda", "fp16", DENSE, flash=False), 1024)
    assert gathers.kept["all"] - on_gpu(LLAMA_8B, tokens=1024).kept["all"] == 1024 * 2 * (6144 + 4096)


@pytest.mark.parametrize("facts", [LLAMA_8B, LLAMA_1B, SMOLLM2_135M])
@pytest.mark.parametrize("frozen", [DENSE, FP8_ONCE, INT8, NF4, NF4_IN_FP8])
def test_less_is_kept_level_by_level(facts: ModelFacts, frozen: Frozen) -> None:
    found = on_gpu(facts, frozen, tokens=8192)
    kept = [found.kept[level] for level in LEVELS]
    assert kept == sorted(kept, reverse=True) and kept[-1] >= 0
    peaks = [found.peak_bytes(tuple(facts.layers * (level == other) for other in LEVELS)) for level in LEVELS]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] > 0.02 * peaks[0]


def test_thin_layers_below_cost_no_more_than_thin_layers_above() -> None:
    """What is made again for the lower layers is made when the upper ones have gone."""
    found = on_gpu(LLAMA_8B, tokens=8192)
    half = found.peak_bytes((16, 0, 16, 0))
    whole, none = found.peak_bytes((32, 0, 0, 0)), found.peak_bytes((0, 0, 32, 0))
    assert half - none == pytest.approx(16 * (found.kept["all"] - found.kept["input"]), rel=0.15)
    assert whole - half == pytest.approx(16 * (found.kept["all"] - found.kept["input"]), rel=0.01)


def test_layers_below_the_lowest_adapted_one_keep_nothing() -> None:
    upper = on_gpu(LLAMA_8B, slots=all_modules(LLAMA_8B, 16, lowest=24), tokens=8192)
    assert upper.layers == 8
    assert upper.peak_bytes((8, 0, 0, 0)) < 0.3 * on_gpu(LLAMA_8B, tokens=8192).peak_bytes((32, 0, 0, 0))


def test_slots_of_a_run() -> None:
    several = all_modules(LLAMA_8B, 8, 20)  # 20 is stored as 24
    assert several == Adapted(widths=(80, 32, 48, 32), rank=24, lowest=0, slots=2, rides=False)
    assert not all_modules(LLAMA_8B, 16, dropout=True).rides and all_modules(LLAMA_8B, 16).rides
    planned = plan_of("lora.targets=qv", "lora.layers=10-", "lora.rank=24").slots[0].lora
    assert adapted_by([planned]) == Adapted(widths=(48, 0, 0, 0), rank=24, lowest=10, slots=1, rides=True)


def test_a_weight_is_dequantised_beside_the_activations() -> None:
    widest = 28_672 * 4_096
    thin = {frozen: on_gpu(LLAMA_8B, frozen, tokens=512).peak_bytes((0, 0, 32, 0)) for frozen in (NF4, NF4_IN_FP8)}
    # In bf16 two bytes a weight; in fp8 one, with the rounded rows beside.
    assert thin[NF4] - thin[NF4_IN_FP8] == pytest.approx(widest, rel=0.1)


def test_fp8_kept_once_is_transposed_on_the_way_back_alone() -> None:
    """With many tokens a forward pass takes the most memory, with few the backward pass."""
    once, twice = (Frozen(format="fp8", fp8_compute=True, fp8_twice=kept) for kept in (False, True))
    peaks = {
        (frozen, tokens): on_gpu(LLAMA_8B, frozen, tokens=tokens).peak_bytes((0, 0, 32, 0))
        for frozen in (once, twice, NF4_IN_FP8)
        for tokens in (512, 8192)
    }
    assert peaks[once, 8192] == peaks[twice, 8192] == peaks[NF4_IN_FP8, 8192] - 28_672 * 4_096
    assert peaks[twice, 512] < peaks[once, 512] < peaks[NF4_IN_FP8, 512]
