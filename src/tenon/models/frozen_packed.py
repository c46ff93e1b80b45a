"""A frozen linear map for inference on a CPU: fp32, laid out in the blocks that oneDNN's products read.

A plain weight is put into such blocks again with every product, which takes as long as the product itself when few rows
share it, as they do while sequences decode. A row's bits do not depend on the rows beside it here: a sequence gets the
same ones alone and in any batch. Nothing of the plain weight is kept.

Shape legend: T tokens, D inputs, O outputs. This module does not know layers, adapters or files.
"""

from __future__ import annotations

from copy import copy
from functools import lru_cache

import torch
from torch import Tensor

from tenon.kernels.fp8 import Fp8Rows
from tenon.kernels.nf4 import Nf4Weight
from tenon.models.frozen import DenseLinear, FrozenLinear, Take, as_tensor, moved_bias

# The blocks are chosen for products of so many rows. From 2 rows on the choice changes the speed by a few percent; for
# a single one oneDNN would choose blocks with which a row's bits depend on the number of rows.
_USUAL_ROWS = 32


class PackedLinear:
    """See the module. What is not inference unpacks the weight first, and is slow."""

    takes_fp8 = False
    output_scale_O: Tensor | None = None

    def __init__(self, weight_OD: Tensor, bias_O: Tensor | None = None) -> None:
        """weight_OD: fp32 on a CPU."""
        self.outputs, self.inputs = weight_OD.shape
        self.bias_O = bias_O
        self._packed = _pack(weight_OD)

    @property
    def size_bytes(self) -> int:
        """Bytes of the weight."""
        return 4 * self.outputs * self.inputs

    def apply(self, x_TD: Tensor, quantised: Fp8Rows | None = None) -> Tensor:  # noqa: ARG002 (of the protocol)
        """(T, D) -> (T, O)."""
        if not x_TD.shape[0]:
            return x_TD.new_empty(0, self.outputs)
        rows = x_TD.shape[0]
        padded = padded_rows(rows)
        if padded != rows:
            wide_TD = x_TD.new_zeros(padded, self.inputs)
            wide_TD[:rows] = x_TD
            x_TD = wide_TD
        return torch.ops.mkldnn._linear_pointwise(x_TD, self._packed, self.bias_O, "none", [], "")[:rows]

    def apply_transposed(self, dy_TO: Tensor, quantised: Fp8Rows | None = None) -> Tensor:  # noqa: ARG002
        """(T, O) -> (T, D)."""
        return dy_TO @ self._packed.to_dense()

    def put(self, start: int, weight: Tensor | Nf4Weight) -> None:
        """Set rows: all of it is packed again."""
        whole_OD = self._packed.to_dense()
        weight = as_tensor(weight, whole_OD.device)
        whole_OD[start : start + len(weight)] = weight
        self._packed = _pack(whole_OD)

    def dense(self, start: int, stop: int) -> Tensor:
        """A copy of the rows."""
        return self._packed.to_dense()[start:stop]

    def moved(self, take: Take) -> PackedLinear:
        """See `FrozenLinear.moved`."""
        there = copy(self)
        there._packed, there.bias_O = _pack(take(self._packed.to_dense())), moved_bias(self.bias_O, take)
        return there


def padded_rows(rows: int) -> int:
    """So many rows are multiplied for so many.

    oneDNN makes a kernel for every number of rows at every weight's shape, half a megabyte each, and keeps a thousand:
    a server grew by hundreds of megabytes in its first hour. Of few rows each number has its own, of many only some do.
    A lone row goes as two: alone it takes another way on some processors (AMD Zen 5), which adds long rows up in
    another order.
    """
    for limit, step in ((16, 1), (64, 4), (256, 16)):
        if rows <= limit:
            return max(-(-rows // step) * step, 2)
    return -(-rows // 64) * 64


def packed(linear: FrozenLinear) -> FrozenLinear:
    """The same map packed, where that can be; else the map itself."""
    if not isinstance(linear, DenseLinear) or linear.border or not can_pack(linear.weight_OD):
        return linear
    return PackedLinear(linear.weight_OD, linear.bias_O)


def can_pack(weight_OD: Tensor) -> bool:
    """Whether products of this weight are faster packed, and this build of torch has them."""
    return weight_OD.device.type == "cpu" and weight_OD.dtype == torch.float32 and _has_packed_products()


@lru_cache(maxsize=1)
def _has_packed_products() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    x_TD = torch.eye(2)
    try:
        # They are torch's own compiler's, which promises nothing of their names.
        return torch.equal(PackedLinear(x_TD).apply(x_TD), x_TD)
    except (AttributeError, RuntimeError):
        return False


def _pack(weight_OD: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight_OD.contiguous(), _USUAL_ROWS)
