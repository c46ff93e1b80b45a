"""The decoder: one pass for every family, over packed tokens, with the adapters of any slots.

Families differ in a few facts (biases, query/key norms, layers without rotation, windows), which are data: see
`bases.facts.ModelFacts`. Weights that share an input are stored stacked, so that q, k, v are one product and gate, up
one. `forward` is for inference; `record` goes forward and can come back.

Shape legend: T tokens, L labelled tokens, D hidden, E head dimension, V vocabulary.
This module does not know losses, text, files, or how adapters are stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from tenon.bases.facts import MODULE_PATHS, STACKS, ModelFacts
from tenon.batch import Batch
from tenon.kernels.blocks_triton import TILE
from tenon.kernels.copy_many import CopyTable, ScaledCopy, copy_many, copy_table
from tenon.kernels.gpu import can_fuse
from tenon.kernels.low_rank import CUT_TOKENS, RANK_STEP, FewTokens, LoraGroup, LowRank, Routes, Sum
from tenon.kernels.nf4 import Nf4Weight
from tenon.kernels.rms_norm import add_norm, add_norm_backward
from tenon.kernels.rotary import HeadShape, Rotation
from tenon.models import flash
from tenon.models import layer as layers
from tenon.models.attention import Attention, PackedAttention
from tenon.models.frozen import DenseLinear, FrozenKind, FrozenLinear
from tenon.models.frozen_formats import make_frozen
from tenon.models.frozen_packed import PackedLinear, can_pack, packed
from tenon.models.frozen_plain import plain_linear
from tenon.models.host import HostStore
from tenon.models.layer import Keep, Layer, LayerTape, Pass, Stream
from tenon.models.rope import rotary_tables
from tenon.models.shards import ShardedLayers, Sharing
from tenon.models.walk import LayerWalk, ResidentLayers
from tenon.models.weights import Place, layer_places, load_tensors, tensor_place

# Below so many tokens a batch does not win back the time that it takes to fill the borders.
_RIDE_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Rider:
    """A slot whose matrices may lie in the borders of the frozen weights. state: which slot it is, by an object that no
    other has, and a number that changes whenever its matrices do.
    """

    state: tuple[object, int]
    groups: Mapping[tuple[int, str], LoraGroup]


class Bank(Protocol):
    """What the decoder asks of the adapters: the additions at each stacked weight for a batch."""

    def low_rank(self, layer: int, stack: str, batch: Batch, routes: Routes | None) -> LowRank | None:
        """The low-rank additions of the batch's slots at one stacked weight; None where no slot adapts it.

        routes: the batch's, where kernels are fused.
        """
        ...

    def rider(self, batch: Batch) -> Rider | None:
        """The slot that alone has all of the batch, without dropout; None when there is no such slot."""
        ...

    def lowest_layer(self, batch: Batch) -> int:
        """The first layer that a trained slot of the batch adapts, or the number of layers when there is none."""
        ...


class Decoder:
    """A frozen decoder-only transformer. Weights are set once by `load_tensors` and never change.

    fuse: whether fused kernels run (GPU, half precision), or plain torch. attention_problem: why a recorded pass was
    left to a slower attention than this GPU has, and what helps; "" as long as none was.
    """

    def __init__(
        self,
        facts: ModelFacts,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kind: FrozenKind = "dense",
        compute_fp8: bool = False,
        fp8_twice: bool = True,
        fuse: bool | None = None,
        ride_rank: int = 0,
        shelf_rank: int = 0,
        sharing: Sharing | None = None,
    ) -> None:
        """Allocates the weights, uninitialised; fill them with `load_tensors`.

        kind: what the linear weights are kept in; embedding, head and norms stay in dtype. compute_fp8, fp8_twice: see
        `make_frozen`. fuse None: where it can. ride_rank: up to this rank of one module a batch of one slot has its
        low-rank sums made inside the frozen products (dense, fused; takes ride_rank / hidden more memory). shelf_rank:
        ranks of all slots together whose A lie below the frozen weights, instead of riding, so that a pass of few
        tokens has no products for them apart. sharing: the layers are spread over the ranks; `layers` is empty then,
        and nothing rides.
        """
        self.facts, self.dtype, self.device = facts, dtype, device
        self.kind: FrozenKind = kind
        self._fp8 = compute_fp8, fp8_twice
        self.fuse = can_fuse(device, dtype) if fuse is None else fuse
        self._packs = True
        self.attention_problem = ""
        rides = self.fuse and kind == "dense" and sharing is None
        self._ride_rank = -(-ride_rank // RANK_STEP) * RANK_STEP if rides else 0
        self.shelf_rank = shelf_rank if rides and not ride_rank else 0
        self._rider: tuple[object, int] | None = None
        self._border_table: CopyTable | None = None
        self.embedding_VD = self._empty(facts.vocab, facts.hidden)
        self.head_VD = self.embedding_VD if facts.tied_head else self._empty(facts.vocab, facts.hidden)
        self._packed_head: PackedLinear | None = None
        self.final_norm_D = self._empty(facts.hidden)
        self.layers = [self._empty_layer() for _ in range(0 if sharing else facts.layers)]
        self.walk: LayerWalk = (
            ShardedLayers(self._empty_layer, facts, sharing, device=device, quantised=kind != "dense")
            if sharing
            else ResidentLayers(self.layers, facts)
        )
        self._tables = rotary_tables(facts.rope, facts.head_dim, 0, device)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _empty_layer(self) -> Layer:
        facts = self.facts
        gains = [self._empty(facts.head_dim) if facts.qk_norm else None for _ in range(2)]
        return Layer(
            input_norm_D=self._empty(facts.hidden),
            post_norm_D=self._empty(facts.hidden),
            stacks={stack: self._empty_stack(stack) for stack in STACKS},
            heads=HeadShape(facts.heads, facts.kv_heads, facts.head_dim, gains[0], gains[1], facts.norm_eps),
        )

    def _empty_stack(self, stack: str) -> FrozenLinear:
        facts = self.facts
        biased = {"qkv": facts.qkv_bias, "o": facts.output_bias, "gate_up": facts.mlp_bias, "down": facts.mlp_bias}
        shapes = [facts.linear_shape(module) for module in STACKS[stack]]
        return make_frozen(
            self.kind,
            sum(outputs for outputs, _ in shapes),
            shapes[0][1],
            bias=biased[stack],
            dtype=self.dtype,
            device=self.device,
            compute_fp8=self._fp8[0],
            fp8_twice=self._fp8[1],
            border=-(-len(shapes) * self._ride_rank // 16) * 16,
            shelf=len(shapes) * self.shelf_rank,
        )

    @property
    def attends_packed(self) -> bool:
        """Whether variable-length attention takes this decoder's heads: see `data.pack.PackOptions.packed`."""
        return self._packs and flash.fits(self.device, self.dtype, self.facts.head_dim)

    @property
    def rotary_tables(self) -> tuple[Tensor, Tensor]:
        """cos and sin of every position so far, fp32; longer rows bring new ones."""
        return self._tables

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile, as its fused kernels want them listed; 0 when none run."""
        return TILE if self.fuse else 0

    @property
    def is_fast(self) -> bool:
        """Whether it does anything by kernels of its own choice, which plain torch could do too."""
        return self.fuse or self.attends_packed or (self.kind != "dense" and self.device.type == "cuda")

    def plain(self) -> Decoder:
        """The same frozen weights, passed through in plain torch: what the fast path is held against."""
        other = copy(self)
        other.use_plain()
        return other

    def use_plain(self, *, base: bool = False) -> None:
        """From here on pass through in plain torch; batches must be packed anew. base: a quantised base too."""
        self.fuse, self._packs, self._ride_rank, self.attention_problem = False, False, 0, ""
        for layer in self.walk.up() if base else ():
            layer.stacks = {stack: plain_linear(linear) for stack, linear in layer.stacks.items()}

    def pack(self) -> None:
        """Lay the weights out as products on a CPU read them, where that can be: for inference alone, and a head that
        is the embedding too is there twice. See `models.frozen_packed`.
        """
        for layer in self.layers:
            layer.stacks = {stack: packed(linear) for stack, linear in layer.stacks.items()}
        if can_pack(self.head_VD):
            self._packed_head = PackedLinear(self.head_VD)

    # ---- weights in and out -------------------------------------------------------------------------------------

    def places(self) -> dict[str, Place]:
        """Every weight by its name in the files of transformers."""
        named = {
            "model.embed_tokens.weight": tensor_place(self.embedding_VD),
            "model.norm.weight": tensor_place(self.final_norm_D),
        }
        if not self.facts.tied_head:
            named["lm_head.weight"] = tensor_place(self.head_VD)
        for i in range(self.facts.layers):
            named |= {f"model.layers.{i}.{name}": place for name, place in self.walk.places(i).items()}
        return named

    def named_tensors(self) -> dict[str, Tensor]:
        """Every weight by its name, as it is multiplied: a view where it is kept so, else dequantised."""
        return {name: place.get() for name, place in self.places().items()}

    def load_tensors(self, tensors: Iterable[tuple[str, Tensor | Nf4Weight]]) -> None:
        """Take named tensors in, strictly: each exactly once, with its shape.

        Raises BaseModelError base-tensor-unexpected, base-tensor-shape or base-tensor-missing, naming the tensor.
        """
        tied = self.facts.tied_head

        def ignored(name: str) -> bool:
            return (tied and name == "lm_head.weight") or name.endswith("rotary_emb.inv_freq")

        load_tensors(self.places(), tensors, ignored=ignored, family=self.facts.family)

    def linear(self, layer: int, module: str) -> Tensor:
        """The frozen weight (out, in) of one module, as it is multiplied."""
        return layer_places(self.layers[layer], self.facts)[f"{MODULE_PATHS[module]}.weight"].get()

    # ---- passes -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, batch: Batch, bank: Bank | None = None, attention: Attention | None = None) -> Tensor:
        """Hidden states (T, D) after the final norm, for inference.

        bank: adapters of the batch's slots; None runs the bare base for every row.
        attention: a cache's view of the pass; None attends within the batch.
        """
        passes = self._passes(batch, bank, attention or PackedAttention(batch.attention))
        stream = Stream(functional.embedding(batch.ids_T, self.embedding_VD))
        for at, layer in zip(passes, self.walk.up(), strict=True):
            stream, _ = layers.forward(layer, stream, at, record=False)
        return add_norm(stream.x_TD, stream.update, self.final_norm_D, self.facts.norm_eps, fuse=self.fuse)[1]

    @torch.no_grad()
    def record(
        self, batch: Batch, bank: Bank, keep: Sequence[Keep] | None = None, *, attention_bytes: int = 0
    ) -> Recording:
        """The same pass, kept so that it can come back. keep: what each layer leaves behind; None: all of them all.

        attention_bytes: what attention's backward may take beside its results, if that is more than it needs.
        """
        attention = PackedAttention(batch.attention, room_bytes=attention_bytes)
        recording = Recording(self, batch, bank, attention, keep or [Keep.ALL] * self.facts.layers)
        self.attention_problem = self.attention_problem or attention.problem
        return recording

    def logits(self, hidden_LD: Tensor) -> Tensor:
        """(L, V) scores of the next token, for the hidden states that need them."""
        head = self._packed_head
        return functional.linear(hidden_LD, self.head_VD) if head is None else head.apply(hidden_LD)

    def _passes(self, batch: Batch, bank: Bank | None, attention: Attention) -> list[Pass]:
        """What each layer is told of the batch."""
        facts, rotation, routes = self.facts, self._rotation(batch), None
        if self.fuse and bank is not None:
            listed = batch.routes
            if listed is None:
                raise ValueError("fused kernels need a batch that lists its tiles: PackOptions(tile_tokens=…)")
            host = listed.listed if batch.tokens >= CUT_TOKENS else None
            routes = Routes(
                listed.tiles_N3,
                listed.chunks_C3,
                listed.segments_M3,
                listed.whole,
                batch.draw_T,
                host,
                few=None if listed.few is None else FewTokens(*listed.few),
            )

        rider = self._take_rider(batch, bank)

        def low_of(layer: int, stack: str) -> LowRank | None:
            low = None if bank is None else bank.low_rank(layer, stack, batch, routes)
            return low if low is None or rider is None else replace(low, rides=True)

        lows = [{stack: low_of(i, stack) for stack in STACKS} for i in range(facts.layers)]
        return [
            Pass(
                index=i,
                rotation=rotation if facts.rotary_layers[i] else None,
                attention=attention,
                low=lows[i],
                below=lows[i - 1]["down"] if i else None,
                scale=facts.head_dim**-0.5,
                window=facts.window_layers[i],
                eps=facts.norm_eps,
                fuse=self.fuse,
            )
            for i in range(facts.layers)
        ]

    def _take_rider(self, batch: Batch, bank: Bank | None) -> Rider | None:
        """The batch's one slot, with its matrices in the borders; None where it does not pay or does not fit."""
        if bank is None or not self._ride_rank or batch.tokens < _RIDE_TOKENS:
            return None
        rider = bank.rider(batch)
        ranks = () if rider is None else (m.b_OR.shape[1] for g in rider.groups.values() for m in g.members)
        if rider is None or max(ranks) > self._ride_rank:
            return None
        if rider.state != self._rider:
            self._fill_borders(rider, other=self._rider is None or rider.state[0] is not self._rider[0])
            self._rider = rider.state
        return rider

    def _fill_borders(self, rider: Rider, *, other: bool) -> None:
        """Copy a slot's matrices around the weights. other: another slot's lie there now."""
        if other or self._border_table is None:
            self._border_table = copy_table(self._clear_borders(rider))
        copy_many(self._border_table)

    def _clear_borders(self, rider: Rider) -> list[ScaledCopy]:
        """Zeros around the weights, and what is to be copied there."""
        copies = []
        for i, layer in enumerate(self.layers):
            for stack, linear in layer.stacks.items():
                assert isinstance(linear, DenseLinear)
                linear.clear_border()
                group = rider.groups.get((i, stack))
                if group is None:
                    continue
                b_OW, a_WD = linear.border_views(group.a_RD.shape[0])
                copies.append(ScaledCopy(group.a_RD, a_WD))
                for m in group.members:
                    target = b_OW[m.out_start : m.out_stop, m.rank_start : m.rank_stop]
                    copies.append(ScaledCopy(m.b_OR, target, m.scale))
        return copies

    def keep_positions(self, count: int) -> None:
        """Have the tables of so many positions at hand, where they stay as long as no row is longer."""
        if count > self._tables[0].shape[0]:
            length = max(count, 2 * self._tables[0].shape[0], 256)
            self._tables = rotary_tables(self.facts.rope, self.facts.head_dim, length, self.device)

    def _rotation(self, batch: Batch) -> Rotation:
        """cos and sin (T, E) in the decoder's dtype, from fp32 tables that grow as rows get longer."""
        self.keep_positions(batch.positions_end)
        cos_LE, sin_LE = self._tables
        return Rotation(cos_LE[batch.positions_T].to(self.dtype), sin_LE[batch.positions_T].to(self.dtype))


class Recording:
    """One recorded pass: its hidden states, and the way back."""

    def __init__(self, decoder: Decoder, batch: Batch, bank: Bank, attention: Attention, keep: Sequence[Keep]) -> None:
        self._decoder = decoder
        self._passes = decoder._passes(batch, bank, attention)
        self._lowest = bank.lowest_layer(batch)
        self._host = HostStore(decoder.device)
        self._tapes: list[LayerTape | None] = []
        stream = Stream(functional.embedding(batch.ids_T, decoder.embedding_VD))
        for at, layer, kept in zip(self._passes, decoder.walk.up(), keep, strict=True):
            stream, tape = layers.forward(layer, stream, at, record=at.index >= self._lowest)
            self._tapes.append(tape)
            if tape is not None:
                self._put_away(tape, at.index, kept)
        facts = decoder.facts
        self._last_TD, self.hidden_TD = add_norm(
            stream.x_TD, stream.update, decoder.final_norm_D, facts.norm_eps, fuse=decoder.fuse
        )

    def _put_away(self, tape: LayerTape, index: int, keep: Keep) -> None:
        tape.drop(keep)
        if keep is Keep.HOST:
            self._host.put(index, tape.x_TD)
            tape.x_TD = tape.x_TD.new_empty(0)

    @torch.no_grad()
    def backward(self, d_hidden_TD: Tensor) -> None:
        """Add the gradients of all slots into their buffers, from that of the hidden states; call once."""
        decoder = self._decoder
        if self._lowest >= len(self._passes):
            return
        # The fp8 form of a gradient belongs to the weight that reads it, which must be here when the gradient is made.
        downs = [layer.stacks["down"] for layer in decoder.layers] if decoder.walk.resident else []
        last_8 = layers.fp8_room_back(downs[-1], d_hidden_TD, decoder.fuse) if downs else None
        dx_TD, _ = add_norm_backward(
            Sum(d_hidden_TD, None),
            self._last_TD,
            None,
            decoder.final_norm_D,
            decoder.facts.norm_eps,
            fuse=decoder.fuse,
            reader=self._passes[-1].low["down"],
            quantised=last_8,
        )
        gradient: layers.Gradient | None = layers.Gradient(dx_TD, None if last_8 is None else last_8.rows)
        del self._last_TD, self.hidden_TD, last_8, dx_TD
        way = zip(reversed(self._passes[self._lowest :]), decoder.walk.down(self._lowest), strict=True)
        for at, layer in way:
            tape, self._tapes[at.index] = self._tapes[at.index], None
            assert tape is not None and gradient is not None
            if at.index in self._host:
                tape.x_TD = self._host.take(at.index)
            below = downs[at.index - 1] if downs and at.index > self._lowest else None
            gradient = layers.backward(layer, gradient, tape, at, needs_input=at.index > self._lowest, down_below=below)
