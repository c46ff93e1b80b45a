"""Bytes of a step beside the base and the adapters: what layers keep for the way back, and what they need meanwhile.

Counted line by line after `models.layer`, `models.decoder.Recording`, `train.step` and `kernels.linear_cross_entropy`;
where one of these changes what it holds, this changes too. Measured peaks that it is held to are in its tests.

Shape legend: T tokens at once, D hidden, Q features of all query heads, K of all key heads (and of all value heads),
O = Q + 2 K, F feed-forward, V vocabulary, w bytes of an element, W low-rank activations of a stacked weight.
Pure: knows no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tenon.bases.facts import STACKS, ModelFacts, parse_site
from tenon.plan.memory import PRECISION_BYTES, dequantised_bytes, stored_rank
from tenon.plan.values import LEVELS, Frozen, Level, LoraPlan, Precision

# Where attention sums in blocks of its own: see kernels.attention_cudnn. One 32nd of 50 GB takes all heads of four rows
# of 2,048 tokens of an 8B base at once.
ATTENTION_CAPABILITY, _ATTENTION_PARTS, _SUMMED_TOKENS = (9, 0), 32, 128
# Of the largest GPUs.
_PROCESSORS = 132
# Low-rank activations come in rows of whole sixteens, rows with a tail in whole lines of 64 elements.
_LOW_MULTIPLE, _LINE = 16, 64
# Gradients are summed over tokens in so many chunks, and one more for each further slot; few tokens need no chunks.
_CHUNKS, _WHOLE_TOKENS = 8, 2048
# Bytes of one chunk of logits, and how many of its size are there at once: the logits alone where softmax is fused;
# else the logits in fp32 with what logsumexp makes, and in half precision their narrow form too.
_FUSED_LOGITS_BYTES, _LOGITS_BYTES, _LEAST_LOGIT_ROWS = 256 * 1024**2, 128 * 1024**2, 64
# Ids, positions, labels, places of labelled tokens (8 each), coefficients, losses: of one token.
_BATCH_BYTES = 64
# What cuBLAS takes for itself.
_WORKSPACE_BYTES = {"cpu": 0, "cuda": 40_000_000}
# Inputs of layers that are on the device while they are copied out, or while the next one comes: models.host.IN_FLIGHT.
_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True)
class Adapted:
    """What activations depend on of the slots that train together.

    widths: W of each stacked weight, in the order of STACKS. rank: the widest of one module. lowest: the first adapted
    layer. slots: how many. rides: their one slot's sums may be made inside the frozen products.
    """

    widths: tuple[int, int, int, int]
    rank: int
    lowest: int
    slots: int
    rides: bool


def adapted(slots: Sequence[Mapping[str, int]], *, dropout: bool) -> Adapted:
    """slots: for each of them the rank at each of its sites."""
    widths = dict.fromkeys(STACKS, 0)
    for ranks in slots:
        for stack, modules in STACKS.items():
            of_layer: dict[int, int] = {}
            for site, rank in ranks.items():
                layer, module = parse_site(site)
                if module in modules:
                    of_layer[layer] = of_layer.get(layer, 0) + stored_rank(rank)
            widths[stack] = max(widths[stack], _multiple(max(of_layer.values(), default=0), _LOW_MULTIPLE))
    return Adapted(
        widths=(widths["qkv"], widths["o"], widths["gate_up"], widths["down"]),
        rank=max(stored_rank(rank) for ranks in slots for rank in ranks.values()),
        lowest=min(parse_site(site)[0] for ranks in slots for site in ranks),
        slots=len(slots),
        rides=len(slots) == 1 and not dropout,
    )


def adapted_by(loras: Sequence[LoraPlan]) -> Adapted:
    """Of planned slots."""
    ranks = [dict.fromkeys(lora.sites, lora.rank) for lora in loras]
    return adapted(ranks, dropout=any(lora.dropout > 0 for lora in loras))


def attention_room(usable_bytes: float, capability: tuple[int, int] | None) -> int:
    """What attention's backward may take of a device's memory; see `Pass.attention_bytes`."""
    fits = capability is not None and capability >= ATTENTION_CAPABILITY
    return int(usable_bytes / _ATTENTION_PARTS) if fits else 0


@dataclass(frozen=True, slots=True)
class Pass:
    """How a batch is computed, whatever is kept of it.

    flash: whether attention takes rows as they lie, on a GPU. attention_bytes: what its backward may take beside its
    results, if that is more than it needs; 0 where there is no kernel that has a use for it (see `attention_room`).
    longest_tokens: no row has more.
    """

    facts: ModelFacts
    slots: Adapted
    device: str
    precision: Precision
    frozen: Frozen
    flash: bool = True
    attention_bytes: int = 0
    longest_tokens: int = 2048

    @property
    def fused(self) -> bool:
        """Whether fused kernels run: see `kernels.gpu.can_fuse`."""
        return self.device == "cuda" and self.precision != "fp32"


class Activations:
    """Bytes of a pass over so many tokens at once, and the peak of any way to keep its layers."""

    def __init__(self, of: Pass, tokens: int) -> None:
        self._of, self.tokens = of, tokens
        facts, self._w = of.facts, PRECISION_BYTES[of.precision]
        self._q, self._k = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
        self._o, self._d, self._f = self._q + 2 * self._k, facts.hidden, facts.feed_forward
        rides = of.slots.rides and of.fused and of.frozen.format == "dense" and tokens >= _WHOLE_TOKENS
        self._tails = of.slots.widths if rides else (0, 0, 0, 0)
        self._dequantised = dequantised_bytes(facts, of.device, of.precision, of.frozen)
        # A GPU multiplies fp8 as it is kept; what is transposed is for the way back alone.
        as_kept = of.device == "cuda" and of.frozen.format == "fp8" and of.frozen.fp8_compute
        self._dequantised_forward = 0 if as_kept else self._dequantised
        self.kept: dict[Level, float] = {level: self._kept(level) for level in LEVELS}
        self._forward = self._forward_bytes()
        self._backward = {level: self._backward_bytes(level) for level in LEVELS}
        self._loss = self._loss_bytes()
        self._always = tokens * (2 * self._w * facts.head_dim + _BATCH_BYTES) + _WORKSPACE_BYTES[of.device]

    @property
    def layers(self) -> int:
        """Layers that are recorded: from the lowest adapted one on."""
        return self._of.facts.layers - self._of.slots.lowest

    def peak_bytes(self, counts: Sequence[int]) -> int:
        """The most at any time. counts: layers of each of LEVELS; those that keep least lie lowest."""
        whole = sum(count * self.kept[level] for level, count in zip(LEVELS, counts, strict=True))
        waiting = _IN_FLIGHT * self._row(self._d) if counts[LEVELS.index("host")] else 0.0
        highest: Level = next(level for level, count in zip(LEVELS, counts, strict=True) if count)
        # The next layer's forward pass begins with the stream of the one before, which is on its tape or nowhere else.
        stream = self._row(self._d) if highest in ("input", "host") else 0.0
        moments = [whole - self.kept[highest] + stream + self._forward, whole + self._loss]
        below = whole
        for level, count in zip(LEVELS, counts, strict=True):
            if count:
                # Of layers alike the highest has the most below it.
                moments.append(below - self.kept[level] + self._backward[level])
                below -= count * self.kept[level]
        return math.ceil(max(moments) + waiting + self._always)

    # ---- one tensor -------------------------------------------------------------------------------------------------

    def _row(self, columns: float, tail: int = 0) -> float:
        """(T, columns) in the compute dtype, with a tail behind each row: see `low_rank.room`."""
        return self.tokens * self._w * (_multiple(round(columns) + tail, _LINE) if tail else columns)

    def _quantised(self, columns: float) -> float:
        """(T, columns) rounded to fp8 with a scale a row, beside the tensor itself."""
        if not self._of.frozen.fp8_compute:
            return 0.0
        # A CPU imitates fp8: the rounded values are multiplied in fp32.
        return self.tokens * (columns * (1 if self._of.device == "cuda" else 5) + 4)

    def _low(self, *stacks: int) -> float:
        return self._row(sum(self._of.slots.widths[i] for i in stacks))

    def _partial(self, rank: int, columns: int) -> float:
        """Each chunk's part of a gradient, fp32; see `low_rank_triton.partial_sums`."""
        chunked = self._of.fused and self.tokens > _WHOLE_TOKENS
        return 4.0 * (_CHUNKS + self._of.slots.slots) * rank * columns if chunked else 0.0

    # ---- what is kept -----------------------------------------------------------------------------------------------

    def _kept(self, level: Level) -> float:
        """A layer's tape (`LayerTape`), with the input that it shares with nobody."""
        if level == "host":
            return self._low(3)
        if level == "input":
            return self._row(self._d) + self._low(3)
        # x, x2, and attention's side.
        kept = 2 * self._row(self._d) + self._attention_tape() + self._low(0, 1, 3)
        return kept if level == "most" else kept + self._gate_up() + self._low(2)

    def _attention_tape(self) -> float:
        """q, k, v and attention's output, with its logsumexp (fp32)."""
        lse = 4.0 * self.tokens * self._of.facts.heads
        # q, k and v gathered by row, beside the groups' outputs those put back in order.
        gathered = 0.0 if self._of.fused and self._of.flash else self._row(self._o) + self._row(self._q)
        # Rotated where they lie; norms of queries and keys need the projection before them too. Plain torch makes
        # rotated q and k beside the projection, of which v is a view.
        made = (self._o if self._of.facts.qk_norm else 0) if self._of.fused else self._q + self._k
        return self._row(self._o) + self._row(made) + self._row(self._q) + gathered + lse

    def _gate_up(self) -> float:
        return self._row(2 * self._f, self._tails[2])

    # ---- what is needed meanwhile -----------------------------------------------------------------------------------

    def _forward_bytes(self) -> float:
        """The most of a layer's forward pass, with all that its tape may hold: `layer.forward`.

        n is held to its end. Then either n2 with the product that makes gate and up, or h with the one that makes the
        layer's output.
        """
        held = self.kept["all"] + self._row(self._d, self._tails[0])
        gate_up = self._row(self._d, self._tails[2]) + self._quantised(self._d)
        # Plain torch makes silu(g) and multiplies in place.
        down = self._row(self._f, self._tails[3]) + self._quantised(self._f) + self._row(self._d)
        return held + max(gate_up, down) + self._dequantised_forward

    def _rebuild_bytes(self, level: Level) -> float:
        """The most of `layer.rebuild`, with all that it makes; n, where it is made, is held to its end."""
        n = self._row(self._d, self._tails[0]) if level in ("input", "host") else 0.0
        gate_up = self._row(self._d, self._tails[2]) + self._quantised(self._d) + self._dequantised_forward
        return self.kept["all"] + n + gate_up

    def _backward_bytes(self, level: Level) -> float:
        """The most of a layer's backward pass, its whole tape included: `layer.backward` from line to line.

        Held throughout: the gradient that comes in, and that of the hidden states (`train.step`).
        """
        tape, d, f = self.kept["all"], self._d, self._f
        dx = self._row(d, self._tails[3]) + self._row(d)
        rows = [
            # dh, by the product with down; then d_gate_up over gate and up, with both gradients' parts.
            self._row(f) + max(self._quantised(d) + self._dequantised, self._swiglu_bytes()),
            # dn2: gate and up hold d_gate_up, from which it is made.
            self._row(d) + self._quantised(2 * f) + self._dequantised,
            # d_gate_up is gone. dx2 and n2 beside dn2; A's gradient from n2.
            -self._gate_up() + 3 * self._row(d, self._tails[1]) + self._partial(self._of.slots.widths[2], d),
            # dx2; da and the gradients of q, k, v.
            -self._gate_up() + self._row(d, self._tails[1]) + self._attention_backward_bytes(),
            # The tape is gone but for x. dx2, d_qkv and dn, with what makes dn, or then the new dx and n.
            self._row(d) - tape + self._row(d, self._tails[1]) + self._row(self._o, self._tails[0]) + self._row(d)
            + max(self._quantised(self._o) + self._dequantised, 2 * self._row(d, self._tails[3])),
        ]  # fmt: skip
        made_again = 0.0 if level == "all" else self._rebuild_bytes(level)
        return dx + max(tape + max(rows), made_again)

    def _swiglu_bytes(self) -> float:
        if self._of.fused:
            slots = self._of.slots
            return self._partial(slots.rank, 2 * self._f) + self._partial(slots.widths[3], self._f)
        # sigmoid, silu, h, 1 - sigmoid; and d_gate_up, which lies apart.
        return 6 * self._row(self._f)

    def _attention_backward_bytes(self) -> float:
        """da, dq, dk, dv; then d_qkv."""
        own = self._row(self._q) + 2 * self._row(self._o)
        if not self._of.fused:
            return own + self._row(self._o)
        # Flash attention sums dq in fp32, and makes dk and dv for each query head.
        repeated = 2 * self._row(self._q) if self._k != self._q else 0.0
        sums, heads = 4.0 * self.tokens * self._q, self._of.facts.heads
        least = repeated + sums + 8.0 * self.tokens * heads
        if self._of.attention_bytes:
            # cuDNN sums dq apart for each block of a row's tokens, of as many heads at once as there is room for.
            blocks = min(self.tokens, self._of.longest_tokens) / _SUMMED_TOKENS
            return own + max(least, min(self._of.attention_bytes, sums * (blocks + 2)))
        # Flash attention shares its blocks of tokens out over all processors, each with sums of its own.
        rows = max(1, self.tokens // self._of.longest_tokens)
        return own + least + sums * (math.ceil(_PROCESSORS / (rows * heads)) - 1)

    def _loss_bytes(self) -> float:
        """Both ends of the final norm, the labelled tokens' hidden states with their gradient, a chunk of logits.

        Every token may have a label. Then the gradient of all hidden states, and that of the last layer's output.
        """
        vocab, row = self._of.facts.vocab, self._row(self._d)
        if self._of.fused:
            element, limit, copies = self._w, _FUSED_LOGITS_BYTES, 1
        else:
            element, limit, copies = 4, _LOGITS_BYTES, 2 if self._w == 4 else 3
        rows = min(self.tokens, max(_LEAST_LOGIT_ROWS, limit // (element * vocab)))
        return max(4 * row + copies * rows * vocab * element, 4 * row + self._row(self._d, self._tails[3]))


def _multiple(count: int, of: int) -> int:
    return -(-count // of) * of
