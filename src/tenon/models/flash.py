"""Variable-length attention on a GPU: rows end to end, no padding, no gathering, no mask.

Two kernels: torch's flash attention for rows of any lengths (grouped heads, windows), and cuDNN's for rows of one
length, which is faster on Hopper for long rows but plans anew for every shape that it meets (about 170 ms).
Sources: Dao, 2023 (FlashAttention-2). Shape legend: T tokens, H query heads, K key/value heads, E head dimension,
N rows, S tokens of a row. This module does not know how rows were packed; on a CPU it fits nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from tenon.batch import PackedRows

# Rows of one length from here on go to cuDNN: below, its plans cost more than it saves.
_CUDNN_TOKENS = 512
_MOST_HEAD = 256
_CAPABILITY = (8, 0)


def fits(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernels here take such queries: half precision, heads of up to 256 in steps of 8, on a GPU of compute
    capability 8.0 (Ampere) or later.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _CAPABILITY:
        return False
    return dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= _MOST_HEAD


def attend(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, rows: PackedRows, *, scale: float, window: int, record: bool
) -> tuple[Tensor, FlashTape | DenseTape | None]:
    """(T, H, E) causal attention of each row over itself, and the tape. window: as in `packed_attention`."""
    windowed = 0 < window < rows.longest
    if record and rows.equal and rows.longest >= _CUDNN_TOKENS and not windowed and q_THE.shape[-1] <= 128:
        tape = DenseTape(q_THE, k_TKE, v_TKE, rows.longest, scale=scale)
        return tape.out_THE, tape
    tape = FlashTape(q_THE, k_TKE, v_TKE, rows, scale=scale, window=window if windowed else 0)
    return tape.out_THE, tape if record else None


class FlashTape:
    """Flash attention over rows of any length, and its backward."""

    def __init__(
        self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, rows: PackedRows, *, scale: float, window: int
    ) -> None:
        self._inputs, self._rows, self._scale = (q_THE, k_TKE, v_TKE), rows, scale
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


class DenseTape:
    """cuDNN's attention over rows of one length, (N, S) of them, and its backward: a graph of this one operation."""

    def __init__(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, length: int, *, scale: float) -> None:
        self._inputs = tuple(x.detach().requires_grad_() for x in (q_THE, k_TKE, v_TKE))
        with torch.enable_grad(), sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]):
            q, k, v = (x.view(-1, length, *x.shape[1:]).transpose(1, 2) for x in self._inputs)
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            self._graph_THE = out.transpose(1, 2).reshape(q_THE.shape)
        self.out_THE = self._graph_THE.detach()

    def backward(self, d_out_THE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `AttentionTape.backward`."""
        dq, dk, dv = torch.autograd.grad(self._graph_THE, self._inputs, d_out_THE)
        return dq, dk, dv
