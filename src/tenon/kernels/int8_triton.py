"""The Triton kernel of `int8`: dequantise rows, each byte read once. Shape legend as in `int8`."""

from __future__ import annotations

from torch import Tensor

from tenon.kernels.gpu import ceil_div, jit, tl

COLUMNS = 2_048


@jit
def _dequantise_kernel(values_ptr, scale_ptr, out_ptr, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    values = tl.load(values_ptr + row * width + d, mask=d < width, other=0).to(tl.float32)
    values = values * tl.load(scale_ptr + row)
    tl.store(out_ptr + row * width + d, values.to(out_ptr.dtype.element_ty), mask=d < width)


def dequantise_rows(values_OD: Tensor, scale_O: Tensor, out_OD: Tensor) -> None:
    """Fill (O, D) of any float dtype; all contiguous."""
    outputs, width = values_OD.shape
    if not outputs or not width:
        return
    _dequantise_kernel[(outputs, ceil_div(width, COLUMNS))](
        values_OD, scale_O, out_OD, width, COLUMNS=COLUMNS, num_warps=4
    )
