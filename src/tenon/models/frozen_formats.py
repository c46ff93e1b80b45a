"""Frozen linear maps that are kept quantised, fp8, int8 and nf4, and the maker of a map of any kind.

| format | kept, bytes a weight | forward | dgrad |
|---|---|---|---|
| fp8 | E4M3 with a scale a row: 1; or twice, the second time transposed: 2 | fp8 | fp8, transposed before if need be |
| int8 | int8 with a scale a row: 1 | dequantised, one product | dequantised, one product |
| nf4 | bitsandbytes' format: 0.516 | dequantised (to fp8 if asked), one product | the same |

fp8 products need a GPU that multiplies fp8 and sizes of whole sixteens. Elsewhere the same rounded values are
multiplied in fp32: slow, and the same arithmetic, so that a CPU can test it.

Shape legend as in `frozen`. This module does not know layers, adapters or files.
"""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor
from torch.nn import functional

from tenon.kernels import fp8, int8, nf4
from tenon.kernels.fp8 import Fp8Rows
from tenon.kernels.nf4 import Nf4Weight
from tenon.models.frozen import DenseLinear, FrozenKind, FrozenLinear, Take, as_tensor, bytes_of, moved_bias

# Partial sums stay in the tensor cores' registers, about 14 bits wide: their error is far below that of fp8 itself. On
# an H100 the gradients of a 1,024-wide base were as close to those of bf16 with either kind of sum (cosine 0.9717 and
# 0.9714 of the worst module), and a dgrad with fp32 sums takes 12% longer.
FAST_FORWARD = True
FAST_DGRAD = True


class Fp8Linear:
    """E4M3 with one scale a row, which serves both products: dgrad folds the scales into dy and multiplies V^T."""

    takes_fp8 = True

    def __init__(
        self,
        outputs: int,
        inputs: int,
        *,
        bias_O: Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
        twice: bool = True,
    ) -> None:
        """twice: keep V^T too where the products are made in fp8, instead of making it for each dgrad."""
        self.outputs, self.inputs, self.bias_O, self.dtype = outputs, inputs, bias_O, dtype
        self.native = fp8.multiplies_fp8(device, outputs, inputs)
        self.twice = twice and self.native
        self.rows = Fp8Rows(
            torch.empty((outputs, inputs), dtype=fp8.FP8_DTYPE, device=device),
            torch.empty(outputs, dtype=torch.float32, device=device),
        )
        self.output_scale_O: Tensor | None = self.rows.scale_T
        self.ones_D = torch.ones(inputs, dtype=torch.float32, device=device)
        self.columns_DO = torch.empty((inputs if self.twice else 0, outputs), dtype=fp8.FP8_DTYPE, device=device)

    @property
    def size_bytes(self) -> int:
        """Bytes of what is kept and of the scales."""
        return bytes_of(self.rows.values_TD, self.rows.scale_T, self.columns_DO, self.ones_D)

    def apply(self, x_TD: Tensor, quantised: Fp8Rows | None = None) -> Tensor:
        """(T, D) -> (T, O)."""
        x = quantised or fp8.quantise_rows(x_TD)
        if self.native:
            return fp8.product(x, self.rows, self.bias_O, x_TD.dtype, fast=FAST_FORWARD)
        return fp8.product_reference(x, self.rows, self.bias_O, x_TD.dtype)

    def apply_transposed(self, dy_TO: Tensor, quantised: Fp8Rows | None = None) -> Tensor:
        """(T, O) -> (T, D)."""
        dy = quantised or fp8.quantise_rows(dy_TO, self.output_scale_O)
        # The tensor cores take both factors with the summed dimension contiguous, so dgrad multiplies V^T's rows.
        columns = Fp8Rows(self.columns_DO if self.twice else fp8.transposed(self.rows.values_TD), self.ones_D)
        if self.native:
            return fp8.product(dy, columns, None, dy_TO.dtype, fast=FAST_DGRAD)
        return fp8.product_reference(dy, columns, None, dy_TO.dtype)

    def put(self, start: int, weight: Tensor | Nf4Weight) -> None:
        """Quantise rows."""
        rows = fp8.quantise_rows(as_tensor(weight, self.rows.values_TD.device))
        stop = start + len(rows.scale_T)
        self.rows.values_TD[start:stop].view(torch.uint8).copy_(rows.values_TD.view(torch.uint8))
        self.rows.scale_T[start:stop].copy_(rows.scale_T)
        if self.twice:
            values_DO = fp8.transposed(rows.values_TD)
            self.columns_DO[:, start:stop].view(torch.uint8).copy_(values_DO.view(torch.uint8))

    def dense(self, start: int, stop: int) -> Tensor:
        """(n, D) in the compute dtype."""
        rows = Fp8Rows(self.rows.values_TD[start:stop], self.rows.scale_T[start:stop])
        return fp8.dequantise_rows(rows, self.dtype)

    def moved(self, take: Take) -> Fp8Linear:
        """See `FrozenLinear.moved`."""
        there = copy(self)
        there.rows = Fp8Rows(take(self.rows.values_TD), take(self.rows.scale_T))
        there.output_scale_O = there.rows.scale_T
        there.columns_DO = take(self.columns_DO)
        there.bias_O = moved_bias(self.bias_O, take)
        return there


class Int8Linear:
    """int8 with one scale a row, dequantised to the compute dtype each time it is multiplied."""

    takes_fp8 = False
    output_scale_O: Tensor | None = None

    def __init__(
        self, outputs: int, inputs: int, *, bias_O: Tensor | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.outputs, self.inputs, self.bias_O, self.dtype = outputs, inputs, bias_O, dtype
        self.rows = int8.Int8Rows(
            torch.empty((outputs, inputs), dtype=torch.int8, device=device),
            torch.empty(outputs, dtype=torch.float32, device=device),
        )

    @property
    def size_bytes(self) -> int:
        """Bytes of values and scales."""
        return bytes_of(self.rows.values_OD, self.rows.scale_O)

    def apply(self, x_TD: Tensor, quantised: Fp8Rows | None = None) -> Tensor:  # noqa: ARG002 (of the protocol)
        """(T, D) -> (T, O)."""
        return functional.linear(x_TD, int8.dequantise_rows(self.rows, x_TD.dtype), self.bias_O)

    def apply_transposed(self, dy_TO: Tensor, quantised: Fp8Rows | None = None) -> Tensor:  # noqa: ARG002
        """(T, O) -> (T, D)."""
        return dy_TO @ int8.dequantise_rows(self.rows, dy_TO.dtype)

    def put(self, start: int, weight: Tensor | Nf4Weight) -> None:
        """Quantise rows."""
        rows = int8.quantise_rows(as_tensor(weight, self.rows.values_OD.device))
        stop = start + len(rows.scale_O)
        self.rows.values_OD[start:stop].copy_(rows.values_OD)
        self.rows.scale_O[start:stop].copy_(rows.scale_O)

    def dense(self, start: int, stop: int) -> Tensor:
        """(n, D) in the compute dtype."""
        rows = int8.Int8Rows(self.rows.values_OD[start:stop], self.rows.scale_O[start:stop])
        return int8.dequantise_rows(rows, self.dtype)

    def moved(self, take: Take) -> Int8Linear:
        """See `FrozenLinear.moved`."""
        there = copy(self)
        there.rows = int8.Int8Rows(take(self.rows.values_OD), take(self.rows.scale_O))
        there.bias_O = moved_bias(self.bias_O, take)
        return there


class Nf4Linear:
    """nf4, module by module as bitsandbytes packs it, dequantised each time it is multiplied."""

    def __init__(
        self,
        outputs: int,
        inputs: int,
        *,
        bias_O: Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
        compute_fp8: bool = False,
    ) -> None:
        """compute_fp8: multiply in fp8 what is dequantised."""
        self.outputs, self.inputs, self.bias_O, self.dtype, self.device = outputs, inputs, bias_O, dtype, device
        self.compute_fp8 = compute_fp8
        self.native = compute_fp8 and fp8.multiplies_fp8(device, outputs, inputs)
        self.modules: dict[int, Nf4Weight] = {}
        self.scale_O = torch.empty(outputs if compute_fp8 else 0, dtype=torch.float32, device=device)
        self.output_scale_O: Tensor | None = self.scale_O if compute_fp8 else None
        self.inverse_scale_O = torch.empty_like(self.scale_O)
        self.ones_D = torch.ones(inputs if compute_fp8 else 0, dtype=torch.float32, device=device)

    @property
    def size_bytes(self) -> int:
        """Bytes of codes, absmax and scales of all modules put so far."""
        return sum(module.size_bytes for module in self.modules.values()) + bytes_of(
            self.scale_O, self.inverse_scale_O, self.ones_D
        )

    @property
    def takes_fp8(self) -> bool:
        """True where it multiplies in fp8."""
        return self.compute_fp8

    def apply(self, x_TD: Tensor, quantised: Fp8Rows | None = None) -> Tensor:
        """(T, D) -> (T, O)."""
        if not self.compute_fp8:
            return functional.linear(x_TD, self._weight(x_TD.dtype), self.bias_O)
        x, w = quantised or fp8.quantise_rows(x_TD), self._fp8_rows()
        if self.native:
            return fp8.product(x, w, self.bias_O, x_TD.dtype, fast=FAST_FORWARD)
        return fp8.product_reference(x, w, self.bias_O, x_TD.dtype)

    def apply_transposed(self, dy_TO: Tensor, quantised: Fp8Rows | None = None) -> Tensor:
        """(T, O) -> (T, D)."""
        if not self.compute_fp8:
            return dy_TO @ self._weight(dy_TO.dtype)
        dy, w = quantised or fp8.quantise_rows(dy_TO, self.scale_O), self._fp8_columns()
        if self.native:
            return fp8.product(dy, w, None, dy_TO.dtype, fast=FAST_DGRAD)
        return fp8.product_reference(dy, w, None, dy_TO.dtype)

    def put(self, start: int, weight: Tensor | Nf4Weight) -> None:
        """Quantise one whole module, or take it as it was quantised before, bit for bit."""
        if isinstance(weight, Nf4Weight):
            module = weight.copied_to(self.device)
        else:
            module = nf4.quantise(weight.to(self.device))
        self.modules[start] = module
        if self.compute_fp8:
            stop = start + module.shape[0]
            amax_O = nf4.row_amax(module).clamp(min=fp8.SMALLEST_AMAX)
            scale_O, inverse_O = fp8.row_scales(amax_O, fp8.FP8_MAX)
            self.scale_O[start:stop].copy_(scale_O)
            self.inverse_scale_O[start:stop].copy_(inverse_O)

    def dense(self, start: int, stop: int) -> Tensor:
        """(n, D) in the compute dtype."""
        first = max((at for at in self.modules if at <= start), default=0)
        pieces = [self._module(self.modules[at], self.dtype) for at in sorted(self.modules) if first <= at < stop]
        return torch.cat(pieces)[start - first : stop - first]

    def moved(self, take: Take) -> Nf4Linear:
        """See `FrozenLinear.moved`."""
        there = copy(self)
        there.modules = {start: self.modules[start].moved(take) for start in sorted(self.modules)}
        there.scale_O, there.inverse_scale_O = take(self.scale_O), take(self.inverse_scale_O)
        there.output_scale_O = there.scale_O if self.compute_fp8 else None
        there.bias_O = moved_bias(self.bias_O, take)
        return there

    def _module(self, weight: Nf4Weight, dtype: torch.dtype) -> Tensor:
        out_OD = torch.empty(weight.shape, dtype=dtype, device=self.device)
        nf4.dequantise(weight, out_OD)
        return out_OD

    def _weight(self, dtype: torch.dtype) -> Tensor:
        """(O, D) of all modules."""
        out_OD = torch.empty((self.outputs, self.inputs), dtype=dtype, device=self.device)
        for start, module in self.modules.items():
            nf4.dequantise(module, out_OD[start : start + module.shape[0]])
        return out_OD

    def _fp8_rows(self) -> Fp8Rows:
        values_OD = torch.empty((self.outputs, self.inputs), dtype=fp8.FP8_DTYPE, device=self.device)
        for start, module in self.modules.items():
            stop = start + module.shape[0]
            nf4.dequantise_fp8(module, self.inverse_scale_O[start:stop], values_OD[start:stop])
        return Fp8Rows(values_OD, self.scale_O)

    def _fp8_columns(self) -> Fp8Rows:
        values_DO = torch.empty((self.inputs, self.outputs), dtype=fp8.FP8_DTYPE, device=self.device)
        for start, module in self.modules.items():
            stop = start + module.shape[0]
            nf4.dequantise_fp8_transposed(module, self.inverse_scale_O[start:stop], values_DO[:, start:stop])
        return Fp8Rows(values_DO, self.ones_D)


def make_frozen(
    kind: FrozenKind,
    outputs: int,
    inputs: int,
    *,
    bias: bool,
    dtype: torch.dtype,
    device: torch.device,
    compute_fp8: bool = False,
    fp8_twice: bool = True,
    border: int = 0,
    shelf: int = 0,
) -> FrozenLinear:
    """An empty map of one kind: set it with `put`, and its bias_O (uninitialised, in dtype) where there is one.

    compute_fp8: for nf4, multiply in fp8 what is dequantised. fp8_twice: for fp8, keep the transposed weight too.
    border: for dense, ranks of one slot that it has room for. shelf: for dense, rows of A of many slots.
    """
    bias_O = torch.empty(outputs, dtype=dtype, device=device) if bias else None
    if kind == "dense":
        return DenseLinear(outputs, inputs, bias_O=bias_O, dtype=dtype, device=device, border=border, shelf=shelf)
    if kind == "fp8":
        return Fp8Linear(outputs, inputs, bias_O=bias_O, dtype=dtype, device=device, twice=fp8_twice)
    if kind == "int8":
        return Int8Linear(outputs, inputs, bias_O=bias_O, dtype=dtype, device=device)
    return Nf4Linear(outputs, inputs, bias_O=bias_O, dtype=dtype, device=device, compute_fp8=compute_fp8)
