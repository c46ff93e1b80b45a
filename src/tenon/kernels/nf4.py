"""Weights in nf4 with double quantisation, bit for bit the format of bitsandbytes.

A weight (O, D) is one row-major sequence, cut into blocks of 64 whatever the rows:

    absmax_b = max_i |w_bi|,   code_bi = nearest of the 16 levels to w_bi / absmax_b,   w_bi ~ level[code_bi] absmax_b

Two codes a byte, the earlier one in the high half. The absmax are quantised again, in blocks of 256, after their mean
was taken away:

    code_b = nearest of the 256 values of the dynamic map to (absmax_b - offset) / nested_absmax_n
    absmax_b ~ map[code_b] nested_absmax_n + offset              (two roundings, never fused into one)

The levels are the normal distribution's quantiles of Dettmers et al., 2023 (QLoRA); the dynamic map is that of
Dettmers et al., 2022 (8-bit optimizers): seven decades, each with twice the steps of the one below it.

Shape legend: O outputs, D inputs, N bytes, B blocks of 64, C blocks of 256 absmax. This module does not know files, nor
what is multiplied with the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from tenon.kernels import nf4_triton as fused
from tenon.kernels.fp8 import has_fp8

BLOCK = 64
NESTED_BLOCK = 256
SMALLEST_AMAX = 1e-38
# Elements quantised at once: bounds what quantising a large weight needs beside it.
PIECE = NESTED_BLOCK * BLOCK * 512

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True, slots=True)
class NestedAbsmax:
    """How the codes of the absmax are read: the map of 256 values, the absmax (C) of their blocks, the offset ()."""

    map_256: Tensor
    absmax_C: Tensor
    offset: Tensor


@dataclass(frozen=True, slots=True)
class Nf4Weight:
    """One quantised weight (O, D). absmax_B: uint8 codes where nested, the fp32 values themselves otherwise.

    levels_16, and the map of nested absmax, are shared by all weights of a device.
    """

    shape: tuple[int, int]
    packed_N: Tensor
    absmax_B: Tensor
    nested: NestedAbsmax | None
    levels_16: Tensor

    @property
    def size_bytes(self) -> int:
        """Bytes of its own tensors."""
        tensors = [self.packed_N, self.absmax_B]
        if self.nested is not None:
            tensors += [self.nested.absmax_C, self.nested.offset]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def copied_to(self, device: torch.device) -> Nf4Weight:
        """A copy of its own tensors on a device; the map is the device's own where it is the usual one."""
        packed_N, absmax_B = self.packed_N.to(device, copy=True), self.absmax_B.to(device, copy=True)
        nested = self.nested
        if nested is not None:
            usual_256, map_256 = dynamic_map(device), nested.map_256.to(device, copy=True)
            map_256 = usual_256 if torch.equal(map_256, usual_256) else map_256
            nested = NestedAbsmax(map_256, nested.absmax_C.to(device, copy=True), nested.offset.to(device, copy=True))
        return Nf4Weight(self.shape, packed_N, absmax_B, nested, levels(device))

    def moved(self, take: Callable[[Tensor], Tensor]) -> Nf4Weight:
        """The same weight whose own tensors, and map, are what `take` gives for each."""
        nested = self.nested
        if nested is not None:
            nested = NestedAbsmax(take(nested.map_256), take(nested.absmax_C), take(nested.offset))
        return Nf4Weight(self.shape, take(self.packed_N), take(self.absmax_B), nested, self.levels_16)


@cache
def levels(device: torch.device) -> Tensor:
    """The 16 levels, fp32, ascending."""
    return torch.tensor(LEVELS, dtype=torch.float32, device=device)


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """The 256 values of the 8-bit dynamic map, fp32, ascending: +-0.1 to 1 in seven decades, 0 and 1."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2**decade + 1, dtype=torch.float32)
        means = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def _scaled_blocks(x_N: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(x / its block's absmax, padded to whole blocks (B, block); absmax (B)), fp32."""
    blocks = functional.pad(x_N.float(), (0, -len(x_N) % block)).view(-1, block)
    absmax_B = blocks.abs().amax(dim=1) if len(blocks) else blocks.new_empty(0)
    # As bitsandbytes: a product with the reciprocal, not a quotient.
    return (blocks * (1.0 / absmax_B.clamp(min=SMALLEST_AMAX))[:, None]).clamp_(-1, 1), absmax_B


def _nearest(scaled: Tensor, values: Tensor) -> Tensor:
    """Index of the nearest of ascending values, as uint8; the lower one on a tie."""
    return torch.bucketize(scaled, (values[:-1] + values[1:]) / 2, out_int32=True).to(torch.uint8)


def quantise(weight_OD: Tensor, *, nested: bool = True) -> Nf4Weight:
    """(O, D) of any float dtype -> nf4, in pieces, so that little is needed beside the weight."""
    flat_N, table = weight_OD.reshape(-1), levels(weight_OD.device)
    packed, absmaxes = [], []
    for piece in flat_N.split(PIECE):
        scaled, absmax_B = _scaled_blocks(piece, BLOCK)
        codes = _nearest(scaled.view(-1), table)[: len(piece) + len(piece) % 2]
        packed.append((codes[::2] << 4) | codes[1::2])
        absmaxes.append(absmax_B)
    shape = (weight_OD.shape[0], weight_OD.shape[1])
    packed_N, absmax_B = torch.cat(packed), torch.cat(absmaxes)
    if not nested:
        return Nf4Weight(shape, packed_N, absmax_B, None, table)
    offset, values = absmax_B.mean(), dynamic_map(weight_OD.device)
    scaled, absmax_C = _scaled_blocks(absmax_B - offset, NESTED_BLOCK)
    # Absmax that all equal their mean: any code will do, bitsandbytes writes the lowest.
    scaled.masked_fill_(absmax_C[:, None] == 0, -1.0)
    codes_B = _nearest(scaled.view(-1), values)[: len(absmax_B)]
    return Nf4Weight(shape, packed_N, codes_B, NestedAbsmax(values, absmax_C, offset), table)


def absmax(weight: Nf4Weight) -> Tensor:
    """(B) fp32: the absmax of the weight's blocks, dequantised where they are nested."""
    nested = weight.nested
    if nested is None:
        return weight.absmax_B
    scale_B = nested.absmax_C.repeat_interleave(NESTED_BLOCK)[: len(weight.absmax_B)]
    return nested.map_256[weight.absmax_B.int()] * scale_B + nested.offset


def dequantise_reference(weight: Nf4Weight) -> Tensor:
    """The formula in plain torch: (O, D) fp32, to be rounded once to what is wanted."""
    codes = torch.stack((weight.packed_N >> 4, weight.packed_N & 15), dim=1).view(-1)
    count = weight.shape[0] * weight.shape[1]
    values = weight.levels_16[codes.int()][:count]
    return (values * absmax(weight).repeat_interleave(BLOCK)[:count]).view(weight.shape)


def dequantise(weight: Nf4Weight, out_OD: Tensor) -> None:
    """Fill (O, D), contiguous, of any float dtype; one pass on a GPU."""
    if out_OD.is_cuda and not weight.shape[1] % BLOCK:
        fused.dequantise(weight, out_OD)
    else:
        out_OD.copy_(dequantise_reference(weight))


def row_amax(weight: Nf4Weight) -> Tensor:
    """(O) fp32: a bound of the absolute values of each dequantised row, which decides the row's scale in fp8.

    It is reached wherever the blocks are not zero, for then the largest value of a block has the level 1 or -1.
    """
    if weight.shape[1] % BLOCK:
        return dequantise_reference(weight).abs().amax(dim=1)
    return absmax(weight).abs().view(weight.shape[0], -1).amax(dim=1)


def dequantise_scaled_reference(weight: Nf4Weight, inverse_scale_O: Tensor) -> Tensor:
    """The values of fp8 rows in plain torch: (O, D) fp32, to be rounded once to E4M3."""
    return dequantise_reference(weight) * inverse_scale_O[:, None]


def dequantise_fp8(weight: Nf4Weight, inverse_scale_O: Tensor, out_OD: Tensor) -> None:
    """Fill (O, D), contiguous fp8, with the rows times their inverse scales, without a wider copy in between."""
    if has_fp8(out_OD.device) and not weight.shape[1] % BLOCK:
        fused.dequantise(weight, out_OD, inverse_scale_O)
    else:
        out_OD.copy_(dequantise_scaled_reference(weight, inverse_scale_O))


def dequantise_fp8_transposed(weight: Nf4Weight, inverse_scale_O: Tensor, out_DO: Tensor) -> None:
    """Fill (D, O), a slice of columns of fp8 rows, with the transpose of what `dequantise_fp8` gives."""
    if has_fp8(out_DO.device) and not weight.shape[1] % BLOCK:
        fused.dequantise_transposed(weight, out_DO, inverse_scale_O)
    else:
        out_DO.copy_(dequantise_scaled_reference(weight, inverse_scale_O).t())
