"""One decoder layer, forward and backward written out: what it computes, what it keeps, what it computes again.

    n = norm(x)       q, k, v = heads(W_qkv n)      a = attention(q, k, v)     x2 = x + W_o a
    n2 = norm(x2)     g, u = W_gate_up n2           h = silu(g) u              x3 = x2 + W_down h

Each W has the low-rank additions of the batch's slots beside it (see kernels.low_rank). The base is frozen, so the
backward makes the gradient of x and adds the slots' gradients into their buffers; there is no graph. A sum that the
next kernel can make while it reads is handed on unmade (`Sum`), across layers too.

Shape legend: T tokens, D hidden, F feed-forward, O outputs of q, k and v together.
This module does not know families, losses, or which layers keep what.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from tenon.kernels import fp8
from tenon.kernels.fp8 import Fp8Rows
from tenon.kernels.low_rank import (
    Addend,
    LowRank,
    Sum,
    add_gradient_a,
    add_gradient_b,
    project,
    project_apart,
    project_back,
    room,
    whole,
)
from tenon.kernels.rms_norm import Quantised, add_norm, add_norm_backward
from tenon.kernels.rotary import Heads, HeadShape, Rotation, make_heads, make_heads_backward
from tenon.kernels.swiglu import swiglu, swiglu_backward
from tenon.models.attention import Attention, AttentionTape
from tenon.models.frozen import DenseLinear, FrozenLinear


class Keep(Enum):
    """What a layer leaves behind for its backward pass, most memory first.

    ALL: everything but the norms' outputs and h, which are made again at little cost. MOST: not gate and up, the widest
    tensors; their product is computed again. INPUT: only x; the layer's forward pass is computed again. HOST: x alone,
    in the host's memory.
    """

    ALL = "all"
    MOST = "most"
    INPUT = "input"
    HOST = "host"


@dataclass(slots=True)
class Layer:
    """The frozen weights of one decoder layer; q_norm and k_norm (E) only where the family has them."""

    input_norm_D: Tensor
    post_norm_D: Tensor
    stacks: dict[str, FrozenLinear]
    heads: HeadShape


@dataclass(frozen=True, slots=True)
class Pass:
    """What one layer needs of the batch. rotation None: the layer does not rotate. low: the slots' additions at a
    stacked weight. fuse: whether fused kernels run. below: the additions at the layer below's down, which reads the
    gradient that this layer makes.
    """

    index: int
    rotation: Rotation | None
    attention: Attention
    low: Mapping[str, LowRank | None]
    scale: float
    window: int
    eps: float
    fuse: bool
    below: LowRank | None = None


@dataclass(slots=True)
class Stream:
    """The residual stream between two layers: x, and an update that whoever reads it adds."""

    x_TD: Tensor
    update: Sum | None = None


@dataclass(slots=True)
class Gradient:
    """The gradient of the residual stream between two layers. fp8: the same as the lower layer's down takes it, where
    it multiplies fp8 and whoever made the gradient rounded it too.
    """

    dx_TD: Tensor
    fp8: Fp8Rows | None = None


@dataclass(slots=True)
class LayerTape:
    """What one layer's forward pass left behind. x_TD may lie in the host's memory; the rest may be missing."""

    x_TD: Tensor
    heads: Heads | None = None
    attention: AttentionTape | None = None
    attended_TD: Tensor | None = None
    x2_TD: Tensor | None = None
    gate_up: Sum | None = None
    lows: tuple[Tensor | None, ...] = (None, None, None, None)

    def drop(self, keep: Keep) -> None:
        """Let go of what is not to be kept."""
        if keep is Keep.ALL:
            return
        self.gate_up = None
        self.lows = (*self.lows[:2], None, self.lows[3])
        if keep is Keep.MOST:
            return
        self.heads, self.attention, self.attended_TD, self.x2_TD = None, None, None, None
        self.lows = (None, None, None, self.lows[3])


def forward(layer: Layer, stream: Stream, at: Pass, *, record: bool) -> tuple[Stream, LayerTape | None]:
    """The stream after the layer, and what its backward pass needs when it is recorded."""
    n_8 = fp8_room(layer.stacks["qkv"], stream.x_TD, at.fuse)
    x_TD, n_TD = add_norm(
        stream.x_TD,
        stream.update,
        layer.input_norm_D,
        at.eps,
        fuse=at.fuse,
        reader=at.low["qkv"],
        quantised=n_8,
    )
    tape = LayerTape(x_TD)
    _attend(layer, n_TD, n_8, tape, at, record=record)
    assert tape.x2_TD is not None and tape.gate_up is not None
    h_TF = swiglu(tape.gate_up, fuse=at.fuse, reader=at.low["down"])
    down, low_down = _apply(layer, "down", h_TF, at)
    tape.lows = (*tape.lows[:3], low_down)
    after = Stream(tape.x2_TD, down)
    return after, tape if record else None


def fp8_room(linear: FrozenLinear, x_TD: Tensor, fuse: bool) -> Quantised | None:
    """Where the maker of rows like these is to round them to fp8 too, for this product; None where it takes none."""
    rounds = fuse and linear.takes_fp8 and fp8.has_fp8(x_TD.device)
    return Quantised(fp8.empty_rows(x_TD.shape[0], x_TD.shape[1], x_TD.device)) if rounds else None


def fp8_room_back(linear: FrozenLinear, dy_TO: Tensor, fuse: bool) -> Quantised | None:
    """The same for gradients, which the product's scales are folded into."""
    room_8 = fp8_room(linear, dy_TO, fuse)
    return None if room_8 is None else Quantised(room_8.rows, linear.output_scale_O)


def _attend(layer: Layer, n_TD: Tensor, n_8: Quantised | None, tape: LayerTape, at: Pass, *, record: bool) -> None:
    """From the normed input to gate and up, onto the tape. n_8: the normed input in fp8."""
    qkv, low_qkv = _apply(layer, "qkv", n_TD, at, n_8)
    del n_8
    heads = make_heads(qkv, at.rotation, layer.heads, fuse=at.fuse)
    attended_THE, attention = at.attention.attend(
        at.index, heads.q_THE, heads.k_TKE, heads.v_TKE, scale=at.scale, window=at.window, record=record
    )
    attended_TD = attended_THE.flatten(1)
    out, low_o = _apply_apart(layer.stacks["o"], attended_TD, at.low["o"])
    tape.heads, tape.attention, tape.attended_TD = heads, attention, attended_TD
    tape.lows = (low_qkv, low_o, None, None)
    _gate_up(layer, out, tape, at)


def _apply_apart(linear: FrozenLinear, x_TD: Tensor, low: LowRank | None) -> tuple[Sum, Tensor | None]:
    """`_apply` for what attention made, which has no room for a tail: here low does not ride."""
    if low is not None and low.shelved and isinstance(linear, DenseLinear):
        return _shelved(linear, low, x_TD), None
    low_TW = project_apart(x_TD, low)
    return _sum(linear.apply(x_TD), low_TW, low), low_TW


def _gate_up(layer: Layer, out: Sum | None, tape: LayerTape, at: Pass) -> None:
    """Gate and up from the stream and what attention adds to it; out None: x2 is on the tape already."""
    x_TD = tape.x_TD if tape.x2_TD is None else tape.x2_TD
    n2_8 = fp8_room(layer.stacks["gate_up"], x_TD, at.fuse)
    tape.x2_TD, n2_TD = add_norm(
        x_TD,
        out,
        layer.post_norm_D,
        at.eps,
        fuse=at.fuse,
        reader=at.low["gate_up"],
        quantised=n2_8,
        added=at.low["o"],
    )
    tape.gate_up, low_TW = _apply(layer, "gate_up", n2_TD, at, n2_8)
    tape.lows = (*tape.lows[:2], low_TW, tape.lows[3])


def _apply(layer: Layer, stack: str, x_TD: Tensor, at: Pass, x_8: Quantised | None = None) -> tuple[Sum, Tensor | None]:
    """(the stacked weight's product with what is still to be added, the low-rank activations). x_8: x in fp8."""
    linear, low = layer.stacks[stack], at.low[stack]
    if low is not None and low.shelved and isinstance(linear, DenseLinear):
        return _shelved(linear, low, x_TD), None
    low_TW = project(x_TD, low)
    if low is None or not low.rides or not isinstance(linear, DenseLinear):
        return _sum(linear.apply(x_TD, None if x_8 is None else x_8.rows), low_TW, low), low_TW
    # The gradient of gate and up will lie in the same tensor, and have a tail too.
    y_TO = room(x_TD, linear.outputs, low if stack == "gate_up" else None)
    linear.apply_bordered(whole(x_TD, low), y_TO)
    return Sum(y_TO, None), low_TW


def _shelved(linear: DenseLinear, low: LowRank, x_TD: Tensor) -> Sum:
    """The product whose low-rank activations came out of it too. A pass of few tokens is not recorded."""
    both_TX = linear.apply_shelved(x_TD, low.shelved)
    return Sum(both_TX[:, : linear.outputs], Addend(both_TX[:, linear.outputs :], low, back=False))


def _sum(y_TO: Tensor, low_TW: Tensor | None, low: LowRank | None) -> Sum:
    return Sum(y_TO, _addend(low_TW, low, back=False))


def _addend(low_TW: Tensor | None, low: LowRank | None, *, back: bool) -> Addend | None:
    return None if low_TW is None or low is None else Addend(low_TW, low, back=back)


def rebuild(layer: Layer, tape: LayerTape, at: Pass) -> None:
    """Compute again what the tape lacks; the same kernels on the same inputs give the same bits."""
    if tape.x2_TD is None:
        n_8 = fp8_room(layer.stacks["qkv"], tape.x_TD, at.fuse)
        _, n_TD = add_norm(
            tape.x_TD,
            None,
            layer.input_norm_D,
            at.eps,
            fuse=at.fuse,
            reader=at.low["qkv"],
            quantised=n_8,
            added=at.below,
        )
        low_down = tape.lows[3]
        _attend(layer, n_TD, n_8, tape, at, record=True)
        tape.lows = (*tape.lows[:3], low_down)
    elif tape.gate_up is None:
        _gate_up(layer, None, tape, at)


def backward(
    layer: Layer,
    gradient: Gradient,
    tape: LayerTape,
    at: Pass,
    *,
    needs_input: bool,
    down_below: FrozenLinear | None = None,
) -> Gradient | None:
    """The gradient of the layer's input, from that of its output; the slots' gradients are added into their buffers.

    needs_input False: nothing below is trained, None comes back. down_below: the layer below's, where it is known. The
    tape is used up.
    """
    rebuild(layer, tape, at)
    dx_TD = gradient.dx_TD
    low_qkv, low_o, low_gate_up, low_down = tape.lows
    assert tape.heads is not None and tape.attention is not None and tape.gate_up is not None
    assert tape.attended_TD is not None and tape.x2_TD is not None

    dh, d_low = _back(layer, "down", dx_TD, low_down, at, gradient.fp8)
    gradient.fp8 = None
    back, ahead = _addend(d_low, at.low["down"], back=True), _addend(low_gate_up, at.low["gate_up"], back=False)
    d_gate_up = swiglu_backward(dh, tape.gate_up, back, ahead, fuse=at.fuse)
    tape.gate_up = None
    del dh

    dn2, d_low = _back(layer, "gate_up", d_gate_up, None, at)
    del d_gate_up
    dx2_8 = fp8_room_back(layer.stacks["o"], dx_TD, at.fuse)
    dx2_TD, n2_TD = add_norm_backward(
        dn2, tape.x2_TD, dx_TD, layer.post_norm_D, at.eps, fuse=at.fuse, reader=at.low["o"], quantised=dx2_8
    )
    _add_a(n2_TD, d_low, at.low["gate_up"])
    del dn2, n2_TD

    da, d_low = _back(layer, "o", dx2_TD, low_o, at, None if dx2_8 is None else dx2_8.rows)
    del dx2_8
    _add_a(tape.attended_TD, d_low, at.low["o"])
    grads = tape.attention.backward(da.settled().view(tape.heads.q_THE.shape))
    d_qkv = make_heads_backward(grads, tape.heads, at.rotation, layer.heads, fuse=at.fuse, reader=at.low["qkv"])
    tape.heads, tape.attention, tape.attended_TD, tape.x2_TD = None, None, None, None
    del da, grads

    if not needs_input:
        _lowest(layer, d_qkv, low_qkv, tape.x_TD, at)
        return None
    dn, d_low = _back(layer, "qkv", d_qkv, low_qkv, at)
    dx_8 = None if down_below is None else fp8_room_back(down_below, dx2_TD, at.fuse)
    dx_TD, n_TD = add_norm_backward(
        dn, tape.x_TD, dx2_TD, layer.input_norm_D, at.eps, fuse=at.fuse, reader=at.below, quantised=dx_8
    )
    _add_a(n_TD, d_low, at.low["qkv"])
    return Gradient(dx_TD, None if dx_8 is None else dx_8.rows)


def _back(
    layer: Layer, stack: str, dy_TO: Tensor, low_TW: Tensor | None, at: Pass, dy_8: Fp8Rows | None = None
) -> tuple[Sum, Tensor | None]:
    """(the gradient of the stacked weight's input, d_low); B's gradient is added, where low_TW is given. dy_8: dy with
    the weight's scales, in fp8.
    """
    linear, low = layer.stacks[stack], at.low[stack]
    if low is None:
        return Sum(linear.apply_transposed(dy_TO, dy_8), None), None
    d_low_TW = project_back(dy_TO, low)
    if low_TW is not None:
        add_gradient_b(dy_TO, low_TW, low)
    if low.rides and isinstance(linear, DenseLinear):
        return Sum(linear.apply_transposed_bordered(whole(dy_TO, low)), None), d_low_TW
    return Sum(linear.apply_transposed(dy_TO, dy_8), Addend(d_low_TW, low, back=True)), d_low_TW


def _add_a(x_TD: Tensor, d_low_TW: Tensor | None, low: LowRank | None) -> None:
    if d_low_TW is not None and low is not None:
        add_gradient_a(x_TD, d_low_TW, low)


def _lowest(layer: Layer, d_qkv_TO: Tensor, low_TW: Tensor | None, x_TD: Tensor, at: Pass) -> None:
    """The slots' gradients at q, k and v of the lowest trained layer, without the gradient of its input."""
    low = at.low["qkv"]
    if low is None or low_TW is None:
        return
    d_low_TW = project_back(d_qkv_TO, low)
    add_gradient_b(d_qkv_TO, low_TW, low)
    _, n_TD = add_norm(x_TD, None, layer.input_norm_D, at.eps, fuse=at.fuse)
    add_gradient_a(n_TD, d_low_TW, low)
