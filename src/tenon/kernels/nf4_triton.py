"""The Triton kernels of `nf4`: dequantise to any float dtype, to fp8, and to fp8 transposed.

All read each packed byte once and write each result once. The absmax of a block is made from its code where the block
is used; product and sum are rounded apart (`enable_fp_fusion=False`), as bitsandbytes does it. The levels are looked up
in memory: sixteen fp32 lie in sixteen banks of one cache line, so that no look-up waits for another.

Shape legend as in `nf4`. The wrappers want D to be a multiple of 64, so that blocks lie within rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from tenon.kernels.gpu import ceil_div, jit, tl

if TYPE_CHECKING:
    from tenon.kernels.nf4 import Nf4Weight

# Blocks of 64 that one program dequantises into rows; blocks across and rows down of one transposed tile.
FLAT_BLOCKS = 64
TILE_BLOCKS = 2
TILE_ROWS = 128


@jit
def _values(
    block,
    live,
    packed_ptr,
    absmax_ptr,
    map_ptr,
    nested_ptr,
    offset_ptr,
    levels_ptr,
    NESTED: tl.constexpr,
):
    """(len(block), 64) fp32: the dequantised blocks of these numbers; `live` masks numbers that do not exist."""
    if NESTED:
        code = tl.load(absmax_ptr + block, mask=live, other=0).to(tl.int32)
        nested = tl.load(nested_ptr + block // 256, mask=live, other=0.0)
        absmax = tl.load(map_ptr + code) * nested
        absmax = absmax + tl.load(offset_ptr)
    else:
        absmax = tl.load(absmax_ptr + block, mask=live, other=0.0)
    at = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    codes = tl.load(packed_ptr + at, mask=live[:, None], other=0).to(tl.int32)
    high = tl.load(levels_ptr + (codes >> 4))
    low = tl.load(levels_ptr + (codes & 15))
    return tl.interleave(high, low) * absmax[:, None]


@jit
def _dequantise_kernel(
    packed_ptr,
    absmax_ptr,
    map_ptr,
    nested_ptr,
    offset_ptr,
    levels_ptr,
    inverse_scale_ptr,
    out_ptr,
    blocks,
    row_blocks,
    NESTED: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    live = block < blocks
    values = _values(block, live, packed_ptr, absmax_ptr, map_ptr, nested_ptr, offset_ptr, levels_ptr, NESTED)
    if SCALED:
        values = values * tl.load(inverse_scale_ptr + block // row_blocks, mask=live, other=0.0)[:, None]
    at = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), mask=live[:, None])


@jit
def _transposed_kernel(
    packed_ptr,
    absmax_ptr,
    map_ptr,
    nested_ptr,
    offset_ptr,
    levels_ptr,
    inverse_scale_ptr,
    out_ptr,
    out_stride,
    outputs,
    row_blocks,
    NESTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    # A tile of ROWS rows and BLOCKS blocks of each; as a list of blocks it is ROWS * BLOCKS long.
    number = tl.arange(0, ROWS * BLOCKS)
    row = tl.program_id(1).to(tl.int64) * ROWS + number // BLOCKS
    column_block = tl.program_id(0) * BLOCKS + number % BLOCKS
    live = (row < outputs) & (column_block < row_blocks)
    block = row * row_blocks + column_block
    values = _values(block, live, packed_ptr, absmax_ptr, map_ptr, nested_ptr, offset_ptr, levels_ptr, NESTED)
    values = values * tl.load(inverse_scale_ptr + row, mask=live, other=0.0)[:, None]
    tile = tl.trans(tl.reshape(values.to(out_ptr.dtype.element_ty), (ROWS, BLOCKS * 64)))
    d = tl.program_id(0).to(tl.int64) * (BLOCKS * 64) + tl.arange(0, BLOCKS * 64)
    o = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = (d < row_blocks * 64)[:, None] & (o < outputs)[None, :]
    tl.store(out_ptr + d[:, None] * out_stride + o[None, :], tile, mask=mask)


def _operands(weight: Nf4Weight) -> tuple[Tensor, ...]:
    """The tensors that `_values` reads, in its order; stand-ins where the absmax are not nested."""
    nested = weight.nested
    if nested is None:
        return weight.packed_N, weight.absmax_B, weight.levels_16, weight.levels_16, weight.levels_16, weight.levels_16
    return weight.packed_N, weight.absmax_B, nested.map_256, nested.absmax_C, nested.offset, weight.levels_16


def dequantise(weight: Nf4Weight, out_OD: Tensor, inverse_scale_O: Tensor | None = None) -> None:
    """Fill (O, D), contiguous, of any float dtype, fp8 among them. inverse_scale_O multiplies the rows."""
    blocks = len(weight.absmax_B)
    if not blocks:
        return
    _dequantise_kernel[(ceil_div(blocks, FLAT_BLOCKS),)](
        *_operands(weight),
        weight.levels_16 if inverse_scale_O is None else inverse_scale_O,
        out_OD,
        blocks,
        weight.shape[1] // 64,
        NESTED=weight.nested is not None,
        SCALED=inverse_scale_O is not None,
        BLOCKS=FLAT_BLOCKS,
        num_warps=4,
        enable_fp_fusion=False,
    )


def dequantise_transposed(weight: Nf4Weight, out_DO: Tensor, inverse_scale_O: Tensor) -> None:
    """Fill (D, O) with (w * inverse_scale)^T. Its rows are contiguous; a slice of a wider one's columns will do."""
    outputs, row_blocks = weight.shape[0], weight.shape[1] // 64
    if not outputs or not row_blocks:
        return
    # Neighbouring programs share rows of the weight, so that what one reads beside its own lies in the cache.
    _transposed_kernel[(ceil_div(row_blocks, TILE_BLOCKS), ceil_div(outputs, TILE_ROWS))](
        *_operands(weight),
        inverse_scale_O,
        out_DO,
        out_DO.stride(0),
        outputs,
        row_blocks,
        NESTED=weight.nested is not None,
        ROWS=TILE_ROWS,
        BLOCKS=TILE_BLOCKS,
        num_warps=8,
        enable_fp_fusion=False,
    )
