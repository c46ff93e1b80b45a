"""Rotary position embedding: how fast each pair of features turns, and the tables of cosines and sines.

Features are paired half against half: feature i turns together with feature i + E/2 (the "rotate_half" convention of
the checkpoints in Hugging Face's layout), so a table row holds the E/2 angles twice.

Shape legend: L positions, E head dimension, H = E/2 frequencies. This module does not know queries, keys or layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tenon.bases.facts import RopeFacts


def inverse_frequencies(rope: RopeFacts, head_dim: int) -> tuple[Tensor, float]:
    """The angle per position of each feature pair, and the factor on cosines and sines.

    Returns: inv_freq_H (fp32, on the CPU), attention factor (1.0 except for yarn).
    Source: Su et al., "RoFormer" (arXiv:2104.09864): inv_freq_i = theta^(-2i/E).
    """
    exponent_H = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    wavelength_H = rope.theta**exponent_H  # over 2 pi
    if rope.kind == "yarn":
        return _yarn_frequencies(rope, head_dim, wavelength_H), _yarn_attention_factor(rope)
    inv_freq_H = 1.0 / wavelength_H
    if rope.kind == "linear":
        # Chen et al., "Position Interpolation" (arXiv:2306.15595): positions shrink by the factor.
        inv_freq_H = inv_freq_H / rope.factor
    elif rope.kind == "llama3":
        inv_freq_H = _llama3_frequencies(rope, inv_freq_H)
    return inv_freq_H, 1.0


def rotary_tables(rope: RopeFacts, head_dim: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 … length - 1, the attention factor folded in.

    Returns: cos_LE, sin_LE in fp32. Angles are computed on the CPU, so every device gets the same table.
    """
    inv_freq_H, factor = inverse_frequencies(rope, head_dim)
    angles_LH = torch.arange(length, dtype=torch.float32)[:, None] * inv_freq_H
    angles_LE = torch.cat((angles_LH, angles_LH), dim=-1)
    return (angles_LE.cos() * factor).to(device), (angles_LE.sin() * factor).to(device)


def _llama3_frequencies(rope: RopeFacts, inv_freq_H: Tensor) -> Tensor:
    """Long waves are stretched by the factor, short ones kept, those between are blended.

    With turns_i = context * inv_freq_i / 2 pi and s_i = (turns_i - low) / (high - low):
    inv_freq_i / factor where turns_i < low; inv_freq_i where turns_i > high; else (1 - s_i) inv_freq_i / factor +
    s_i inv_freq_i. Source: Llama 3.1, `apply_scaling` of Meta's reference code.
    """
    context = rope.original_context_tokens
    wavelength_H = 2 * math.pi / inv_freq_H
    long_H = wavelength_H > context / rope.low_freq_factor
    short_H = wavelength_H < context / rope.high_freq_factor
    blend_H = (context / wavelength_H - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended_H = (1 - blend_H) * inv_freq_H / rope.factor + blend_H * inv_freq_H
    return torch.where(long_H, inv_freq_H / rope.factor, torch.where(short_H, inv_freq_H, blended_H))


def _yarn_frequencies(rope: RopeFacts, head_dim: int, wavelength_H: Tensor) -> Tensor:
    """Pairs that turn often keep their frequency, those that turn seldom are stretched, a ramp lies between.

    The pair that makes r turns over the original context is i(r) = E ln(context / 2 pi r) / (2 ln theta); the ramp goes
    from i(beta_fast) to i(beta_slow). Source: Peng et al., "YaRN" (arXiv:2309.00071), section 3.2.
    """

    def pair_of(turns: float) -> float:
        waves = rope.original_context_tokens / (turns * 2 * math.pi)
        return head_dim * math.log(waves) / (2 * math.log(rope.theta))

    first, last = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    ramp_H = ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    # Written as transformers writes it, so that the rounding is the same too.
    keep_H = 1 - ramp_H
    return 1.0 / (rope.factor * wavelength_H) * (1 - keep_H) + 1.0 / wavelength_H * keep_H


def _yarn_attention_factor(rope: RopeFacts) -> float:
    """0.1 m ln(factor) + 1 unless the config says it, as the ratio of two m where both are given."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _yarn_scale(rope.factor, rope.mscale) / _yarn_scale(rope.factor, rope.mscale_all_dim)
    return _yarn_scale(rope.factor, 1.0)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
