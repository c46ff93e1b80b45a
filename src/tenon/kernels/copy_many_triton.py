"""The Triton kernel of `copy_many`: a program copies a block of one matrix, counted row after row."""

from __future__ import annotations

from torch import Tensor

from tenon.kernels.blocks_triton import bits_to_float
from tenon.kernels.gpu import ceil_div, constant, jit, tl

# Elements that are read and written at once where all begin and end so: 16 bytes in half precision.
VECTOR = 8
_FIELDS = constant(6)
_BLOCK = 4096


@jit
def _copy_kernel(fields_ptr, like_ptr, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    fields = fields_ptr + tl.program_id(1) * _FIELDS
    columns = tl.multiple_of(tl.load(fields + 3).to(tl.int32), VECTOR)
    count = tl.multiple_of(tl.load(fields + 2).to(tl.int32) * columns, VECTOR)
    first = tl.program_id(0) * BLOCK
    if first < count:
        source_ptr = tl.multiple_of(tl.load(fields).to(like_ptr.dtype), 2 * VECTOR)
        target_ptr = tl.multiple_of(tl.load(fields + 1).to(like_ptr.dtype), 2 * VECTOR)
        stride = tl.multiple_of(tl.load(fields + 4), VECTOR)
        at = first + tl.arange(0, BLOCK)
        inside = at < count
        value = tl.load(source_ptr + at, mask=inside, other=0.0)
        scaled = (value.to(tl.float32) * bits_to_float(tl.load(fields + 5))).to(value.dtype)
        tl.store(target_ptr + (at // columns).to(tl.int64) * stride + at % columns, scaled, mask=inside)


def copy_many(fields_N6: Tensor, like: Tensor, most: int, *, vectors: bool) -> None:
    """See `copy_many.copy_many`."""
    _copy_kernel[(ceil_div(most, _BLOCK), len(fields_N6))](
        fields_N6, like, BLOCK=_BLOCK, VECTOR=VECTOR if vectors else 1, num_warps=4
    )
