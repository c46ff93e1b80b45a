"""What the decoder asks of a frozen linear map, and the map that is kept as it is multiplied.

    y = x W^T + bias,      dx = dy W,      W (O, D) is never trained

One map may hold several modules stacked along its outputs (q, k, v; gate, up); each is quantised alone, as it is put.
The quantised formats are in `frozen_formats`.

Shape legend: T tokens, D inputs, O outputs. This module does not know layers, adapters or files.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from tenon.kernels import nf4
from tenon.kernels.fp8 import Fp8Rows
from tenon.kernels.low_rank import LINE
from tenon.kernels.nf4 import Nf4Weight

FrozenKind = Literal["dense", "fp8", "int8", "nf4"]
Take: TypeAlias = Callable[[Tensor], Tensor]


class FrozenLinear(Protocol):
    """y = x W^T + bias with W (O, D) frozen, whatever it is kept in.

    output_scale_O: (O) fp32, to be folded into dy before it is quantised for `apply_transposed`; None unless takes_fp8.
    """

    outputs: int
    inputs: int
    bias_O: Tensor | None
    output_scale_O: Tensor | None

    @property
    def size_bytes(self) -> int:
        """Bytes that it keeps while nothing runs."""
        ...

    @property
    def takes_fp8(self) -> bool:
        """Whether `apply` and `apply_transposed` use rows that their producer has quantised to fp8 already."""
        ...

    def apply(self, x_TD: Tensor, quantised: Fp8Rows | None = None) -> Tensor:
        """(T, D) -> (T, O) in the dtype of x. quantised: x in fp8."""
        ...

    def apply_transposed(self, dy_TO: Tensor, quantised: Fp8Rows | None = None) -> Tensor:
        """(T, O) -> (T, D) in the dtype of dy. quantised: dy times output_scale_O in fp8."""
        ...

    def put(self, start: int, weight: Tensor | Nf4Weight) -> None:
        """Set rows [start, start + n) to one whole module's weight (n, D), on any device, quantised before or not."""
        ...

    def dense(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) as they are multiplied, in the compute dtype."""
        ...

    def moved(self, take: Take) -> FrozenLinear:
        """The same map whose tensors are what `take` gives for each of these, of the same shape and dtype."""
        ...


class DenseLinear:
    """A plain tensor weight_OD in the compute dtype; with a border, room for one slot's matrices around it.

        [ W  s B ]      [x, low] [W, s B]^T = W x + s B low
        [ A   .  ]      [dy, d_low] [W; A]  = dy W + d_low A

    so that the low-rank sums of a batch of one slot are made inside the products. With a shelf, room for the A of many
    slots below it, so that one product of few tokens makes every slot's low-rank activations too:

        [ W ; A_1 ; A_2 … ]      x [W; A_1; A_2 …]^T = [W x, A_1 x, A_2 x …]

    The weight itself never changes.
    """

    takes_fp8 = False
    output_scale_O: Tensor | None = None

    def __init__(
        self,
        outputs: int,
        inputs: int,
        *,
        bias_O: Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
        border: int = 0,
        shelf: int = 0,
    ) -> None:
        """border: ranks that it has room for. shelf: rows of A that it has room for, where it has no border."""
        assert not (border and shelf)
        self.outputs, self.inputs, self.bias_O, self.border = outputs, inputs, bias_O, border
        self.shelf_bias_S: Tensor | None = None
        if shelf and bias_O is not None:
            self.shelf_bias_S = torch.zeros(outputs + shelf, dtype=dtype, device=device)
            self.bias_O = self.shelf_bias_S[:outputs]
        # Rows begin at whole lines of memory; see `kernels.low_rank.room`.
        stride = -(-(inputs + border) // LINE) * LINE if border else inputs
        whole = torch.empty((outputs + border + shelf, stride), dtype=dtype, device=device)
        self._shelved = whole[:, :inputs]
        self._bordered = whole[: outputs + border, : inputs + border]
        self.weight_OD = self._bordered[:outputs, :inputs]
        self.clear_border()
        self.shelf(0, shelf).zero_()

    @property
    def size_bytes(self) -> int:
        """Bytes of the weight."""
        return bytes_of(self._bordered)

    def shelf(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) below the weight, to be written."""
        return self._shelved[self.outputs + start : self.outputs + stop]

    def apply_shelved(self, x_TD: Tensor, rows: int) -> Tensor:
        """(T, D) -> (T, O + rows): the product, then the low-rank activations of the shelf's first rows."""
        bias_S = None if self.shelf_bias_S is None else self.shelf_bias_S[: self.outputs + rows]
        return functional.linear(x_TD, self._shelved[: self.outputs + rows], bias_S)

    def clear_border(self) -> None:
        """Zeros around the weight."""
        self._bordered[self.outputs :].zero_()
        self._bordered[:, self.inputs :].zero_()

    def border_views(self, width: int) -> tuple[Tensor, Tensor]:
        """(s B (O, width), A (width, D)) of the border, to be written."""
        b_OW = self._bordered[: self.outputs, self.inputs : self.inputs + width]
        return b_OW, self._bordered[self.outputs : self.outputs + width, : self.inputs]

    def apply_bordered(self, x_TX: Tensor, out_TO: Tensor) -> None:
        """out = [x, low] [W, s B]^T + bias; x_TX (T, D + width)."""
        weight_XO = self._bordered[: self.outputs, : x_TX.shape[1]].t()
        if self.bias_O is None:
            torch.mm(x_TX, weight_XO, out=out_TO)
        else:
            torch.addmm(self.bias_O, x_TX, weight_XO, out=out_TO)

    def apply_transposed_bordered(self, dy_TX: Tensor) -> Tensor:
        """[dy, d_low] [W; A], (T, D); dy_TX (T, O + width)."""
        return dy_TX @ self._bordered[: dy_TX.shape[1], : self.inputs]

    def apply(self, x_TD: Tensor, quantised: Fp8Rows | None = None) -> Tensor:  # noqa: ARG002 (of the protocol)
        """(T, D) -> (T, O)."""
        return functional.linear(x_TD, self.weight_OD, self.bias_O)

    def apply_transposed(self, dy_TO: Tensor, quantised: Fp8Rows | None = None) -> Tensor:  # noqa: ARG002
        """(T, O) -> (T, D)."""
        return dy_TO @ self.weight_OD

    def put(self, start: int, weight: Tensor | Nf4Weight) -> None:
        """Copy rows in."""
        weight = as_tensor(weight, self.weight_OD.device)
        self.weight_OD[start : start + len(weight)].copy_(weight)

    def dense(self, start: int, stop: int) -> Tensor:
        """A view of the rows."""
        return self.weight_OD[start:stop]

    def moved(self, take: Take) -> DenseLinear:
        """See `FrozenLinear.moved`."""
        there = copy(self)
        there._bordered = take(self._bordered)
        there.weight_OD = there._shelved = there._bordered[: self.outputs, : self.inputs]
        there.bias_O = moved_bias(self.bias_O, take)
        return there


def as_tensor(weight: Tensor | Nf4Weight, device: torch.device) -> Tensor:
    """A weight (n, D) on a device, dequantised to fp32 where it was quantised before."""
    return nf4.dequantise_reference(weight.copied_to(device)) if isinstance(weight, Nf4Weight) else weight.to(device)


def moved_bias(bias_O: Tensor | None, take: Take) -> Tensor | None:
    """A bias elsewhere, see `FrozenLinear.moved`."""
    return None if bias_O is None else take(bias_O)


def bytes_of(*tensors: Tensor) -> int:
    """What tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
