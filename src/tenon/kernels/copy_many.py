"""Many matrices copied at once, each times a factor, to where they are wanted: one launch for hundreds of them.

    target = factor source

Shape legend: R rows, C columns of one matrix, N copies. This module does not know what the matrices are.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tenon.kernels import copy_many_triton as fused
from tenon.kernels.copy_many_triton import VECTOR


@dataclass(frozen=True, slots=True)
class ScaledCopy:
    """source_RC: row after row. target_RC: rows may lie apart. Both of one dtype."""

    source_RC: Tensor
    target_RC: Tensor
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class CopyTable:
    """Copies as the kernel reads them: it holds addresses, so that the tensors must stay where they are.

    fields_N6: int64 addresses of source and target, rows, columns, elements from one target row to the next, the bits
    of the factor. like: a tensor of their dtype. most: elements of the largest. vectors: whether all of them can be
    read and written VECTOR elements at a time.
    """

    fields_N6: Tensor
    like: Tensor
    most: int
    vectors: bool


def copy_many_reference(copies: Sequence[ScaledCopy]) -> None:
    """One after another, in plain torch."""
    for copy in copies:
        torch.mul(copy.source_RC, copy.factor, out=copy.target_RC)


def copy_table(copies: Sequence[ScaledCopy]) -> CopyTable:
    """The table of at least one copy."""
    rows = [_fields(copy) for copy in copies]
    # A target, so that a table does not keep the sources alive.
    like = copies[0].target_RC
    step_bytes = VECTOR * like.element_size()
    vectors = all(
        source % step_bytes == target % step_bytes == columns % VECTOR == stride % VECTOR == 0
        for source, target, _, columns, stride, _ in rows
    )
    fields = torch.tensor(rows, dtype=torch.int64)
    return CopyTable(fields.to(like.device), like, max(copy.source_RC.numel() for copy in copies), vectors)


def _fields(copy: ScaledCopy) -> list[int]:
    source, target = copy.source_RC, copy.target_RC
    assert source.is_contiguous() and source.shape == target.shape and target.stride(1) == 1
    assert source.dtype == target.dtype
    (bits,) = struct.unpack("<i", struct.pack("<f", copy.factor))
    return [source.data_ptr(), target.data_ptr(), *source.shape, target.stride(0), bits]


def copy_many(table: CopyTable) -> None:
    """All copies of a table, by a kernel."""
    fused.copy_many(table.fields_N6, table.like, table.most, vectors=table.vectors)
