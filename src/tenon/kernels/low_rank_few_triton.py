"""The low-rank products of a pass of few tokens, one token a program: what continues sequences by a token each.

The matrix units want sixteen tokens of one slot, and such a pass has one or two. Sums are made by the ordinary units,
whose speed is enough for what memory brings. The inputs of one token are spread over several programs, so that all of
the GPU reads A; the program that ends last joins the parts, in their order whichever it is. Shape legend as in
`low_rank`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenon.kernels.blocks_triton import bits_to_float, matrix_at, member_at, ranks_at, site_at
from tenon.kernels.gpu import ceil_div, jit, power_of_two, tl

# Ranks and inputs of a program.
_RANKS = 16
_DEPTH = 1024


@dataclass(frozen=True, slots=True)
class FewTokens:
    """slot_T: int32, the slot of each token or NO_SLOT. part, arrivals: where programs leave their parts (fp32) and
    count each other (int32, zero between launches); enough for `width` low-rank activations of `inputs` inputs.
    """

    slot_T: Tensor
    part: Tensor
    arrivals: Tensor

    @staticmethod
    def of(slot_T: Tensor, *, width: int, inputs: int) -> FewTokens:
        """With memory for the widest product of a decoder."""
        blocks, parts = slot_T.shape[0] * ceil_div(width, _RANKS), ceil_div(inputs, _DEPTH)
        part = torch.empty(blocks * parts * _RANKS, dtype=torch.float32, device=slot_T.device)
        return FewTokens(slot_T, part, torch.zeros(blocks, dtype=torch.int32, device=slot_T.device))


@jit
def _project_kernel(
    x_ptr,
    x_stride,
    low_ptr,
    low_stride,
    slot_ptr,
    table_ptr,
    part_ptr,
    arrival_ptr,
    width,
    DEPTH: tl.constexpr,
    RANKS: tl.constexpr,
    PARTS: tl.constexpr,
    MOST_PARTS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token)
    if slot >= 0:
        site = site_at(table_ptr, slot)
        rank = ranks_at(site + 2)
        first = tl.program_id(1) * RANKS
        if first < rank:
            a_ptr = matrix_at(tl.load(site), low_ptr)
            r, d = first + tl.arange(0, RANKS), tl.program_id(2) * DEPTH + tl.arange(0, DEPTH)
            inside = d < width
            x = tl.load(x_ptr + token * x_stride + d, mask=inside, other=0.0).to(tl.float32)
            mask = (r < rank)[:, None] & inside[None, :]
            a = tl.load(a_ptr + r[:, None].to(tl.int64) * width + d[None, :], mask=mask, other=0.0)
            total = tl.sum(a.to(tl.float32) * x[None, :], 1)
            last = 1
            if PARTS > 1:
                block = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
                parts = part_ptr + block * (PARTS * RANKS) + tl.arange(0, RANKS)
                tl.store(parts + tl.program_id(2) * RANKS, total)
                # All of this program's part is out before it says so.
                tl.debug_barrier()
                last = (tl.atomic_add(arrival_ptr + block, 1, sem="acq_rel") == PARTS - 1).to(tl.int32)
                if last == 1:
                    i = tl.arange(0, MOST_PARTS)[:, None]
                    there = tl.load(parts[None, :] + i * RANKS, mask=i < PARTS, other=0.0, cache_modifier=".cg")
                    total = tl.sum(there, 0)
                    tl.store(arrival_ptr + block, 0)
            if last == 1:
                tl.store(low_ptr + token * low_stride + r, total.to(low_ptr.dtype.element_ty), mask=r < rank)


@jit
def row_term(low_ptr, low_stride, token, slot, table_ptr, member, columns, inside, RANKS: tl.constexpr):
    """s B low of one module of a stacked weight, for one token: (columns) fp32; zeros without a slot."""
    acc = tl.zeros((columns.shape[0],), dtype=tl.float32)
    if slot >= 0:
        at = member_at(site_at(table_ptr, slot), member)
        b_ptr = matrix_at(tl.load(at), low_ptr)
        rank, start = ranks_at(at + 2), ranks_at(at + 3)
        for first in range(0, rank, RANKS):
            r = first + tl.arange(0, RANKS)
            low = tl.load(low_ptr + token * low_stride + start + r, mask=r < rank, other=0.0).to(tl.float32)
            mask = inside[:, None] & (r < rank)[None, :]
            b = tl.load(b_ptr + columns[:, None].to(tl.int64) * rank + r[None, :], mask=mask, other=0.0)
            acc += tl.sum(b.to(tl.float32) * low[None, :], 1)
        acc = acc * bits_to_float(tl.load(at + 4))
    return acc


def project(x_TD: Tensor, low_TW: Tensor, width: int, few: FewTokens, table_SF: Any) -> None:
    """See `low_rank.project`. width: the widest low."""
    inputs = x_TD.shape[1]
    parts = ceil_div(inputs, _DEPTH)
    _project_kernel[(x_TD.shape[0], ceil_div(width, _RANKS), parts)](
        x_TD,
        x_TD.stride(0),
        low_TW,
        low_TW.stride(0),
        few.slot_T,
        table_SF,
        few.part,
        few.arrivals,
        inputs,
        DEPTH=min(_DEPTH, power_of_two(inputs, least=16)),
        RANKS=_RANKS,
        PARTS=parts,
        MOST_PARTS=power_of_two(parts),
        num_warps=4,
    )
