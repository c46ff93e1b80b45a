"""The activation of few tokens of many slots: a program has some features of one token (see `swiglu_triton`)."""

from __future__ import annotations

from torch import Tensor

from tenon.kernels.gpu import ceil_div, jit, tl
from tenon.kernels.low_rank import Addend
from tenon.kernels.low_rank_few_triton import row_term

_COLUMNS = 128


@jit
def _swiglu_kernel(
    gate_up_ptr,
    gate_up_stride,
    h_ptr,
    h_stride,
    low_ptr,
    low_stride,
    slot_ptr,
    table_ptr,
    width,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token)
    f = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = f < width
    gate_at = gate_up_ptr + token * gate_up_stride + f
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + width, mask=inside, other=0.0).to(tl.float32)
    gate += row_term(low_ptr, low_stride, token, slot, table_ptr, 0, f, inside, 8)
    up += row_term(low_ptr, low_stride, token, slot, table_ptr, 1, f, inside, 8)
    h = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(h_ptr + token * h_stride + f, h.to(h_ptr.dtype.element_ty), mask=inside)


def swiglu(gate_up_TF2: Tensor, addend: Addend, h_TF: Tensor) -> None:
    """See `swiglu.swiglu`; written into h_TF."""
    few = addend.low.few
    assert few is not None
    tokens, width = h_TF.shape
    _swiglu_kernel[(tokens, ceil_div(width, _COLUMNS))](
        gate_up_TF2,
        gate_up_TF2.stride(0),
        h_TF,
        h_TF.stride(0),
        addend.low_TW,
        addend.low_TW.stride(0),
        few.slot_T,
        addend.low.table_SF,
        width,
        COLUMNS=_COLUMNS,
        num_warps=1,
    )
