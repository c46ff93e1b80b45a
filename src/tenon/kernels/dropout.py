"""Dropout whose mask is a pure function of (key of the token, salt of the place, feature).

    keep[t, d] = mix(key[t] xor salt xor d * G) >= p * 2^32,   y = x * keep / (1 - p)

`mix` is a 32-bit integer finaliser (Ettinger's "lowbias32" constants, public domain). No generator state is carried:
the mask of a token does not depend on the batch that it came in, nor on the device, and the backward computes it anew.
Shape legend: T tokens, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = -1640531527  # 0x9E3779B9 as a signed 32-bit integer
_FIRST = 0x21F0AAAD
_SECOND = 0x735A2D97


def mix32(x: Tensor) -> Tensor:
    """Scramble int32 values; a bijection on 32-bit integers."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _FIRST
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _SECOND
    return x ^ ((x >> 15) & 0x1FFFF)


def keep_mask(key_T: Tensor, salt: int, features: int, probability: float) -> Tensor:
    """(T, D) bool: which features stay; each stays with chance 1 - probability."""
    columns_D = torch.arange(features, device=key_T.device, dtype=torch.int32) * _GOLDEN
    draws_TD = mix32((key_T ^ salt).unsqueeze(1) ^ columns_D.unsqueeze(0))
    threshold = round(probability * 2**32) - 2**31
    return draws_TD >= max(-(2**31), min(threshold, 2**31 - 1))


def dropout(x_TD: Tensor, key_T: Tensor, salt: int, probability: float) -> Tensor:
    """x with each feature dropped with the given probability and the rest scaled by 1 / (1 - p); new tensor."""
    keep = keep_mask(key_T, salt, x_TD.shape[-1], probability)
    return x_TD * (keep.to(x_TD.dtype) / (1.0 - probability))
