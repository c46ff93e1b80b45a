"""A quantised linear map multiplied in plain torch, from the same bytes: what its kernels are held against.

Slow, and right wherever torch is: nothing of `kernels.*_triton` and no fp8 product runs. A run whose base's kernels are
wrong goes on with these.

Shape legend: T tokens, D inputs, O outputs. This module does not know layers or runs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tenon.kernels import fp8, int8, nf4
from tenon.kernels.fp8 import Fp8Rows
from tenon.kernels.nf4 import Nf4Weight
from tenon.models.frozen import DenseLinear, FrozenLinear, Take
from tenon.models.frozen_formats import Fp8Linear, Int8Linear, Nf4Linear

_TOKENS = 64


class PlainLinear:
    """See `models.frozen.FrozenLinear`; the bytes are those of the map that it is made of."""

    takes_fp8 = False
    output_scale_O: Tensor | None = None

    def __init__(self, kept: FrozenLinear) -> None:
        self._kept = kept
        self.outputs, self.inputs, self.bias_O = kept.outputs, kept.inputs, kept.bias_O

    @property
    def size_bytes(self) -> int:
        """What the map keeps."""
        return self._kept.size_bytes

    def apply(self, x_TD: Tensor, quantised: Fp8Rows | None = None) -> Tensor:  # noqa: ARG002 (of the protocol)
        """(T, D) -> (T, O)."""
        rows = self._fp8_rows()
        if rows is None:
            return functional.linear(x_TD, self._weight(x_TD.dtype), self.bias_O)
        return fp8.product_reference(fp8.quantise_rows_reference(x_TD), rows, self.bias_O, x_TD.dtype)

    def apply_transposed(self, dy_TO: Tensor, quantised: Fp8Rows | None = None) -> Tensor:  # noqa: ARG002
        """(T, O) -> (T, D)."""
        rows = self._fp8_rows()
        if rows is None:
            return dy_TO @ self._weight(dy_TO.dtype)
        columns = Fp8Rows(rows.values_TD.t(), torch.ones_like(rows.scale_T[:1]).expand(self.inputs))
        dy = fp8.quantise_rows_reference(dy_TO, rows.scale_T)
        return fp8.product_reference(dy, columns, None, dy_TO.dtype)

    def put(self, start: int, weight: Tensor | Nf4Weight) -> None:
        """See `FrozenLinear.put`."""
        self._kept.put(start, weight)

    def dense(self, start: int, stop: int) -> Tensor:
        """See `FrozenLinear.dense`."""
        return self._kept.dense(start, stop)

    def moved(self, take: Take) -> PlainLinear:
        """See `FrozenLinear.moved`."""
        return PlainLinear(self._kept.moved(take))

    def _fp8_rows(self) -> Fp8Rows | None:
        """The weight as it is multiplied in fp8; None where it is not."""
        kept = self._kept
        if isinstance(kept, Fp8Linear):
            return kept.rows
        if not isinstance(kept, Nf4Linear) or not kept.compute_fp8:
            return None
        values_OD = torch.empty((self.outputs, self.inputs), dtype=fp8.FP8_DTYPE, device=kept.device)
        for start, module in kept.modules.items():
            part = slice(start, start + module.shape[0])
            values_OD[part] = nf4.dequantise_scaled_reference(module, kept.inverse_scale_O[part]).to(fp8.FP8_DTYPE)
        return Fp8Rows(values_OD, kept.scale_O)

    def _weight(self, dtype: torch.dtype) -> Tensor:
        """(O, D), dequantised."""
        kept = self._kept
        if isinstance(kept, Nf4Linear):
            return torch.cat([nf4.dequantise_reference(kept.modules[at]).to(dtype) for at in sorted(kept.modules)])
        if isinstance(kept, Int8Linear):
            return int8.dequantise_rows_reference(kept.rows, dtype)
        return kept.dense(0, self.outputs)


def plain_linear(linear: FrozenLinear) -> FrozenLinear:
    """The same map in plain torch; a dense one is that already."""
    return linear if isinstance(linear, DenseLinear | PlainLinear) else PlainLinear(linear)


def product_error(linear: FrozenLinear, dtype: torch.dtype, device: torch.device) -> float:
    """How far its two products are from those in plain torch: the larger relative error, infinite for NaN."""
    if isinstance(linear, DenseLinear | PlainLinear):
        return 0.0
    plain, generator = PlainLinear(linear), torch.Generator().manual_seed(0)
    x_TD, dy_TO = (
        torch.randn(_TOKENS, size, generator=generator).to(device, dtype) for size in (linear.inputs, linear.outputs)
    )
    return max(
        _error(linear.apply(x_TD), plain.apply(x_TD)),
        _error(linear.apply_transposed(dy_TO), plain.apply_transposed(dy_TO)),
    )


def _error(found: Tensor, wanted: Tensor) -> float:
    apart = float((found.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-30))
    return apart if apart == apart else float("inf")
