"""What kernels read of every slot at one stacked weight: addresses, ranks, scales, as one table of integers.

This module does not know what the kernels do with it (low_rank_triton, low_rank_gradient_triton).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from tenon.kernels import blocks_triton as blocks
from tenon.kernels.low_rank import RANK_STEP, LoraGroup


def site_table(groups: Sequence[LoraGroup | None], device: torch.device, shifts: Sequence[int] | None = None) -> Tensor:
    """int64 (slots, FIELDS): addresses, ranks, scales of each slot's group at one stacked weight; zeros for None.

    Fields: A, its gradient, R, the dropout threshold, the bits of 1/(1-p), the salt; then for each of three modules B,
    its gradient, its rank, the place of its ranks, the bits of its scale. shifts: added to the places of the ranks.
    """
    rows = [
        [0] * blocks.FIELDS if group is None else _site_fields(group, shift)
        for group, shift in zip(groups, shifts or [0] * len(groups), strict=True)
    ]
    return torch.tensor(rows, dtype=torch.int64).to(device)


def _site_fields(group: LoraGroup, shift: int) -> list[int]:
    fields = [0] * blocks.FIELDS
    grad_a = 0 if group.grad_a_RD is None else group.grad_a_RD.data_ptr()
    threshold = max(-(2**31), min(round(group.dropout * 2**32) - 2**31, 2**31 - 1))
    fields[: blocks.MEMBERS_AT] = [
        group.a_RD.data_ptr(),
        grad_a,
        group.a_RD.shape[0],
        threshold,
        _float_bits(1.0 / (1.0 - group.dropout)),
        group.salt,
    ]
    for m in group.members:
        at = blocks.MEMBERS_AT + blocks.MEMBER_FIELDS * m.index
        grad_b = 0 if m.grad_b_OR is None else m.grad_b_OR.data_ptr()
        rank, start = m.rank_stop - m.rank_start, shift + m.rank_start
        assert rank % RANK_STEP == start % RANK_STEP == 0, "kernels read whole steps of ranks"
        fields[at : at + blocks.MEMBER_FIELDS] = [m.b_OR.data_ptr(), grad_b, rank, start, _float_bits(m.scale)]
    return fields


def _float_bits(value: float) -> int:
    return struct.unpack("<i", struct.pack("<f", value))[0]
