"""Variable-length attention on a GPU: rows end to end, no padding, no gathering, no mask.

Two kernels: cuDNN's, where there is one for the shape, and torch's flash attention for all else (older GPUs, longer
rows than cuDNN's sums have room for, a pass that is not recorded, a cuDNN that cannot be used). Both add up in a fixed
order on the way back, so that a step has the same bits every time.
Sources: Dao, 2023 (FlashAttention-2). Shape legend: T tokens, H query heads, K key/value heads, E head dimension,
N rows, S tokens of a row. This module does not know how rows were packed; on a CPU it fits nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tenon.batch import PackedRows
from tenon.kernels import attention_cudnn as cudnn

_MOST_HEAD = 256
_CAPABILITY = (8, 0)


def fits(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernels here take such queries: half precision, heads of up to 256 in steps of 8, on a GPU of compute
    capability 8.0 (Ampere) or later.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _CAPABILITY:
        return False
    return dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= _MOST_HEAD


@contextmanager
def fixed_order() -> Iterator[None]:
    """torch's own backward passes add up in a fixed order meanwhile, which takes longer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = filled and before[0]  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # pyright: ignore[reportAttributeAccessIssue]


class RowAttention:
    """Attention within the rows of one batch. room_bytes: what a backward pass may take beside its results.

    problem: why flash attention has taken what is cuDNN's, and what helps; "" where it has not.
    """

    def __init__(self, rows: PackedRows, room_bytes: int) -> None:
        self._rows, self._room_bytes = rows, room_bytes
        self.problem = ""
        self._offsets: dict[cudnn.Shape, cudnn.Offsets] = {}

    def attend(
        self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, *, scale: float, window: int, record: bool
    ) -> tuple[Tensor, CudnnTape | FlashTape | None]:
        """(T, H, E) causal attention of each row over itself, and the tape. window: as in `packed_attention`."""
        if record and cudnn.fits(q_THE) and k_TKE.stride() == v_TKE.stride():
            tape = self._by_cudnn(q_THE, k_TKE, v_TKE, scale=scale, window=window)
            if tape is not None:
                return tape.out_THE, tape
        tape = FlashTape(q_THE, k_TKE, v_TKE, self._rows, scale=scale, window=window)
        return tape.out_THE, tape if record else None

    def _by_cudnn(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, *, scale: float, window: int) -> CudnnTape | None:
        bounds_N = self._rows.cu_seqlens_N
        shape = cudnn.shape_of(q_THE, k_TKE, len(bounds_N) - 1, self._rows.longest, scale=scale, window=window)
        groups = cudnn.groups_within(shape, max(self._room_bytes, flash_bytes(q_THE, k_TKE)))
        if not groups.count:
            self.problem = self.problem or groups.problem
            return None
        if shape not in self._offsets:
            self._offsets[shape] = cudnn.offsets_of(bounds_N, shape)
        return CudnnTape((q_THE, k_TKE, v_TKE), shape, self._offsets[shape], groups.count)


def flash_bytes(q_THE: Tensor, k_TKE: Tensor) -> int:
    """What flash attention's backward takes beside its results: dq in fp32, and dk and dv of each query head."""
    repeated = 0 if q_THE.shape[1] == k_TKE.shape[1] else 2 * q_THE.element_size() * q_THE.numel()
    return repeated + 4 * (q_THE.numel() + 2 * q_THE.shape[0] * q_THE.shape[1])


class CudnnTape:
    """cuDNN's attention, and its backward."""

    def __init__(
        self, inputs: tuple[Tensor, Tensor, Tensor], shape: cudnn.Shape, offsets: cudnn.Offsets, groups: int
    ) -> None:
        """groups: key/value heads that the backward takes at once."""
        self._inputs, self._shape, self._offsets, self._groups = inputs, shape, offsets, groups
        self.out_THE, self._stats_TH1 = cudnn.forward(*inputs, shape, offsets)

    def backward(self, d_out_THE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `AttentionTape.backward`."""
        return cudnn.backward(
            d_out_THE.contiguous(),
            self._inputs,
            self.out_THE,
            self._stats_TH1,
            self._shape,
            self._offsets,
            groups=self._groups,
        )


class FlashTape:
    """Flash attention over rows of any length, and its backward."""

    def __init__(
        self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, rows: PackedRows, *, scale: float, window: int
    ) -> None:
        self._inputs, self._rows, self._scale = (q_THE, k_TKE, v_TKE), rows, scale
        window = window if 0 < window < rows.longest else 0
        # Flash attention counts the tokens before the query; the window counts the query itself too.
        self._left = window - 1 if window > 0 else -1
        cu, longest = rows.cu_seqlens_N, rows.longest
        self.out_THE, self._lse, self._seed, self._offset, _ = torch.ops.aten._flash_attention_forward(
            *self._inputs,
            cu,
            cu,
            longest,
            longest,
            0.0,
            True,
            False,
            scale=scale,
            window_size_left=self._left,
            window_size_right=0 if window > 0 else -1,
        )

    def backward(self, d_out_THE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `AttentionTape.backward`."""
        cu, longest = self._rows.cu_seqlens_N, self._rows.longest
        with fixed_order():
            return torch.ops.aten._flash_attention_backward(
                d_out_THE,
                *self._inputs,
                self.out_THE,
                self._lse,
                cu,
                cu,
                longest,
                longest,
                0.0,
                True,
                self._seed,
                self._offset,
                scale=self._scale,
                window_size_left=self._left,
                window_size_right=0 if self._left >= 0 else -1,
            )
