"""How far two gradients of the same slot are apart, and how far rounding alone may take them.

Each matrix is looked at (A and B of every site), and all matrices of one kind (`q_proj A`) together, where a mistake
shows that one matrix hides in its noise:

    error = |f - p| / |p|        scale = <f, p> / <p, p>        with f the gradient that is judged, p the plain one

Rounding: a gradient goes through about twenty roundings a layer, each of half a unit of the dtype's precision eps, so
it differs from the exact one by a multiple of eps that grows with the square root of the layers. Measured against fp32
on SmolLM2-135M (30 layers; bf16 and fp16; 2 to 384 labels): up to 24 eps for a matrix, 13 for a kind, 2 for a kind's
scale where there are many labels. Two paths that round independently differ by sqrt(2) times that. What the bounds are
to find is larger: without the low-rank term of one module in one direction a kind is off by 21 to 86 eps (bf16).

fp8 products round inside: a difference of one bf16 unit before them moves values to the next fp8 number, so that two
right paths differ as much as each does from the exact one.

This module does not know where gradients come from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Multiples of the precision; the layers of the model that they were measured on.
_MATRIX, _KIND, _SCALE = 40.0, 16.0, 5.0
_MEASURED_LAYERS = 30
# Errors with fp8 products, of all matrices and layers alike.
_FP8_MATRIX, _FP8_KIND, _FP8_SCALE = 1.2, 0.6, 0.2
_FP8_LOSS = 0.03
# fp32 is the fast path's dtype in tests alone: sums in another order differ by more than its precision.
_LEAST_EPS = 1e-5
# A matrix whose gradient is smaller than this share of the others' is judged as if it were of that size.
_SMALL = 0.01
_NOTHING = 1e-100


@dataclass(frozen=True, slots=True)
class Bounds:
    """The largest relative error of a matrix and of a kind, the largest |scale - 1| of a kind, the largest relative
    difference of losses.
    """

    matrix: float
    kind: float
    scale: float
    loss: float


@dataclass(frozen=True, slots=True)
class Difference:
    """How a gradient compares with the plain one.

    cosine: of the matrix that agrees least, and its name. problem: what is over its bound, "" when nothing is.
    """

    cosine: float
    matrix: str
    problem: str


def bounds_for(dtype: torch.dtype, *, layers: int, labels: int, fp8: bool) -> Bounds:
    """What rounding may do to a gradient of so many labels in a decoder of so many layers; with few, more.

    The loss is a mean over the labels: 1% for what all of them have in common, and each one's own noise.
    """
    few = 1.0 + 2.0 / math.sqrt(max(1, labels))
    loss = (_FP8_LOSS if fp8 else 0.01) + 0.2 / math.sqrt(max(1, labels))
    if fp8:
        return Bounds(_FP8_MATRIX * few, _FP8_KIND * few, _FP8_SCALE * few, loss)
    unit = max(torch.finfo(dtype).eps, _LEAST_EPS) * few * math.sqrt(max(1.0, layers / _MEASURED_LAYERS))
    return Bounds(_MATRIX * unit, _KIND * unit, _SCALE * unit, loss)


def difference(
    found: Mapping[str, tuple[Tensor, Tensor]], plain: Mapping[str, tuple[Tensor, Tensor]], bounds: Bounds
) -> Difference:
    """Compare the gradients (A, B) of every site. A matrix without a gradient in either is left out."""
    names = [f"{site} {side}" for site in plain for side in "AB"]
    norms = _norms(found, plain)
    sizes = _sizes(norms[:, 1])
    cosine, matrix = 1.0, ""
    worst, where = 0.0, ""
    for i, name in enumerate(names):
        apart, right, own = norms[i].tolist()
        if own == right == 0.0:
            continue
        likeness = _dot(apart, right, own) / (right * own) if right * own > 0.0 else 0.0
        if not matrix or not likeness >= cosine:
            cosine, matrix = likeness, name
        error = apart / max(right, _SMALL * sizes[i % 2], _NOTHING)
        # NaN is the worst, and stays it.
        if not error <= worst and not math.isnan(worst):
            worst, where = error, name
    problem = "" if worst <= bounds.matrix else f"the gradient of {where} is {_percent(worst, bounds.matrix)} off"
    return Difference(cosine, matrix, problem or _kind_problem(names, norms, bounds))


def _norms(found: Mapping[str, tuple[Tensor, Tensor]], plain: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
    """(matrices, 3) fp64 on the host: |found - plain|, |plain|, |found| of each matrix."""
    f, p = [x for pair in found.values() for x in pair], [x for pair in plain.values() for x in pair]
    apart = torch._foreach_sub(f, p)  # pyright: ignore[reportPrivateImportUsage]
    each = [torch.stack(torch._foreach_norm(x)) for x in (apart, p, f)]  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack(each, dim=1).double().cpu()


def _sizes(right_M: Tensor) -> tuple[float, float]:
    """The root mean square of the norms of all A, and of all B."""
    a, b = right_M.view(-1, 2).square().mean(0).sqrt().tolist()
    return a, b


def _dot(apart: float, right: float, own: float) -> float:
    """<found, plain> from the three norms."""
    return (own**2 + right**2 - apart**2) / 2


def _kind_problem(names: list[str], norms: Tensor, bounds: Bounds) -> str:
    """What is over its bound when all matrices of a kind are one vector."""
    squares: dict[str, Tensor] = {}
    for name, row in zip(names, norms.square(), strict=True):
        kind = name.rpartition(".")[2]
        squares[kind] = squares.get(kind, torch.zeros(3, dtype=torch.float64)) + row
    for kind, total in squares.items():
        apart, right, own = total.sqrt().tolist()
        if own == right == 0.0:
            continue
        error = apart / max(right, _NOTHING)
        if not error <= bounds.kind:
            return f"the gradients of all {kind} are {_percent(error, bounds.kind)} off"
        off = abs(_dot(apart, right, own) / max(right, _NOTHING) ** 2 - 1.0)
        if not off <= bounds.scale:
            return f"the gradients of all {kind} are scaled {_percent(off, bounds.scale)} off"
    return ""


def _percent(found: float, bound: float) -> str:
    return f"{100 * found:.3g}% (at most {100 * bound:.3g}%)"
