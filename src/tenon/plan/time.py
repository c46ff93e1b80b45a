"""A first estimate of time: floating-point operations of a token over what the device is known to sustain. Rough.

Shape legend: N_lin parameters of the frozen linear matrices, N_head of the head, N_lora of the adapter, s tokens of a
row, H hidden, L layers. Pure: nothing is measured here.
"""

from __future__ import annotations

from tenon.bases.facts import ModelFacts
from tenon.plan.values import BaseFormat, Frozen, MachineFacts, Precision

# Sustained FLOP/s in half precision, about four tenths of the data sheet's dense peak. First match decides.
GPU_RATES: tuple[tuple[str, float], ...] = (
    ("B200", 900e12),
    ("H200", 400e12),
    ("H100", 400e12),
    ("H800", 400e12),
    ("A100", 130e12),
    ("A800", 130e12),
    ("L40", 130e12),
    ("RTX 5090", 90e12),
    ("RTX 4090", 70e12),
    ("A6000", 60e12),
    ("RTX 3090", 30e12),
    ("A10", 50e12),
    ("L4", 45e12),
    ("V100", 45e12),
    ("T4", 22e12),
)
UNKNOWN_GPU_RATE = 30e12
# fp32 on a GPU runs without tensor cores.
FP32_SLOWDOWN = 8.0
# Measured with SmolLM2-135M on a shared AVX-512 server core (benchmarks/results/spine_demo.json), rounded down.
CPU_CORE_RATE = 60e9
# bf16 without hardware for it.
CPU_BF16_SLOWDOWN = 3.0
# Measured with an 8B shape on an H100: the products of the frozen layers in fp8, all else as it was.
FP8_SPEEDUP = 1.4
# Dequantising in plain torch for every product, and rounding rows to fp8: measured with SmolLM2's widest matrix and
# 2,048 tokens on one AVX-512 core.
CPU_SLOWDOWN: dict[BaseFormat, float] = {"dense": 1.0, "fp8": 1.8, "int8": 1.1, "nf4": 1.2}
# What a step costs beside arithmetic: launches, the optimiser, the data.
STEP_OVERHEAD_SECONDS = {"cpu": 0.02, "cuda": 0.06}


def flops_per_token(
    facts: ModelFacts,
    *,
    lora_parameters: int,
    row_tokens: float,
    supervised_share: float,
    trained_share: float = 1.0,
) -> float:
    """FLOP of one trained token: 4 N_lin + 4 N_head (labelled tokens) + 6 N_lora + attention, forward and backward.

    Attention is causal: 4 (s/2) H L forward, 2.5 times that backward.
    trained_share: layers from the first adapted one on; nothing goes back through those below.
    """
    attention = 2.0 * row_tokens * facts.heads * facts.head_dim * facts.layers
    forward = 2.0 * facts.linear_parameters + attention
    backward = 2.0 * facts.linear_parameters + 2.5 * attention
    flops = forward + trained_share * backward
    return flops + 4.0 * supervised_share * facts.vocab * facts.hidden + 6.0 * lora_parameters


def device_rate(machine: MachineFacts, precision: Precision, frozen: Frozen) -> float:
    """FLOP/s that the device sustains in this precision, with the base in this format."""
    if machine.device == "cpu":
        rate = CPU_CORE_RATE * max(1, machine.threads) / CPU_SLOWDOWN[frozen.format]
        return rate if precision == "fp32" or machine.bf16 else rate / CPU_BF16_SLOWDOWN
    rate = next((rate for name, rate in GPU_RATES if name in machine.device_name), UNKNOWN_GPU_RATE)
    rate *= FP8_SPEEDUP if frozen.fp8_compute else 1.0
    return rate / FP32_SLOWDOWN if precision == "fp32" else rate
