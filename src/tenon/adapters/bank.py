"""The adapter bank: LoRA slots of any rank, targets and scale over one frozen base.

    y[t] = W x[t] + s_slot B_slot A_slot x[t]      for every token t whose row belongs to the slot

Each slot keeps all of its matrices in one flat fp32 tensor (first every A, then every B), and its gradient in another.
So an optimiser step, a norm, a check for NaN and a checkpoint are operations on one tensor, and a slot's state never
mixes with another's. When the decoder computes in another dtype, a shadow copy in that dtype is refreshed by `refresh`.

Matrices are stored with their rank rounded up to a multiple of RANK_STEP, so that every row begins at 16 bytes, which
products read several times faster. The rows of A and the columns of B that this adds are zero, and stay it: their
gradients are sums of products with zeros, and an exact optimiser leaves a zero without gradient where it is.

Shape legend: D inputs, O outputs, R rank, S stored rank, P stored elements of a slot, T tokens.
This module does not know optimisers, files, or what a slot is for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tenon.adapters.site_tables import SiteTables
from tenon.bases.facts import STACKS, ModelFacts, parse_site, site_name
from tenon.batch import Batch, Segment
from tenon.errors import AdapterError
from tenon.kernels.low_rank import RANK_STEP, LoraGroup, LoraMember, LoraPart, LowRank, Routes
from tenon.models.decoder import Rider

Initialisation = Literal["kaiming", "gaussian", "orthogonal"]


@dataclass(frozen=True, slots=True)
class SiteShape:
    """Rank and scale (the factor on B A x) of one adapted matrix."""

    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class SlotShape:
    """What a slot adapts: for each site (`layers.3.self_attn.q_proj`) its rank and scale; and the dropout of its
    input.
    """

    sites: Mapping[str, SiteShape]
    dropout: float = 0.0


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one site's matrices lie in the flat tensor. stored: the rank that they are stored with."""

    a_start: int
    b_start: int
    rank: int
    stored: int
    inputs: int
    outputs: int

    def a(self, flat_P: Tensor) -> Tensor:
        """A as it is stored (S, D), a view."""
        return flat_P[self.a_start : self.a_start + self.stored * self.inputs].view(self.stored, self.inputs)

    def b(self, flat_P: Tensor) -> Tensor:
        """B as it is stored (O, S), a view."""
        return flat_P[self.b_start : self.b_start + self.stored * self.outputs].view(self.outputs, self.stored)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each matrix of a shape lies in a flat tensor of so many elements; the first a_elements belong to A."""

    shape: SlotShape
    places: Mapping[str, _Place]
    a_elements: int
    elements: int

    def views(self, flat_P: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """For each site A (R, D) and B (O, R) as views of a tensor that is laid out so."""
        return {site: (p.a(flat_P)[: p.rank], p.b(flat_P)[:, : p.rank]) for site, p in self.places.items()}


class Slot:
    """One adapter in the bank.

    parameters_P, gradients_P: flat fp32; gradients_P is None for a slot that is only used. a_parameters: how many of
    the first elements belong to A matrices as they are stored (LoRA+ gives the rest another learning rate). version:
    counts refreshes. identity: no other slot has it, not even one made after this one is gone.
    """

    def __init__(
        self,
        name: str,
        layout: Layout,
        facts: ModelFacts,
        *,
        parameters_P: Tensor,
        gradients_P: Tensor | None = None,
        compute_P: Tensor | None = None,
    ) -> None:
        """All tensors are laid out as `layout` says. compute_P: the shadow in the compute dtype; without one the
        parameters are computed with as they are, in whatever dtype they have.
        """
        self.name, self.shape = name, layout.shape
        self._layout, self._places, self.a_parameters = layout, layout.places, layout.a_elements
        self.parameters_P, self.gradients_P = parameters_P, gradients_P
        self._compute_P = parameters_P if compute_P is None else compute_P
        self.groups = _make_groups(self, facts)
        self.version = 0
        self.identity = object()

    @property
    def lowest_layer(self) -> int:
        """The first layer that is adapted."""
        return min(layer for layer, _ in self.groups)

    @property
    def most_rank(self) -> int:
        """The widest stored rank of one module."""
        return max(place.stored for place in self._places.values())

    def matrices(self) -> dict[str, tuple[Tensor, Tensor]]:
        """For each site its fp32 A (R, D) and B (O, R), views of the flat parameters. Rows of B may lie apart."""
        return self.views(self.parameters_P)

    def site_gradients(self) -> dict[str, tuple[Tensor, Tensor]]:
        """For each site the gradients of A and B, views of the flat gradient. Raises ValueError on an untrained
        slot.
        """
        if self.gradients_P is None:
            raise ValueError(f"slot {self.name} is not trained")
        return self.views(self.gradients_P)

    def views(self, flat_P: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """For each site A (R, D) and B (O, R) as views of a tensor that is laid out like the flat parameters."""
        return self._layout.views(flat_P)

    def clear_filling(self) -> None:
        """Zero what fills ranks up, after an update that is not exact at zero."""
        for place in self._places.values():
            if place.stored > place.rank:
                place.a(self.parameters_P)[place.rank :].zero_()
                place.b(self.parameters_P)[:, place.rank :].zero_()

    def refresh(self) -> None:
        """Bring the shadow copy in the compute dtype up to date; call after the parameters changed."""
        self.version += 1
        if self._compute_P is not self.parameters_P:
            self._compute_P.copy_(self.parameters_P)

    def group_member(self, site: str) -> tuple[_Place, Tensor, Tensor | None]:
        """Place, compute-dtype B, and gradient of B of one site, as they are stored."""
        place = self._places[site]
        return place, place.b(self._compute_P), None if self.gradients_P is None else place.b(self.gradients_P)

    def stacked_a(self, sites: list[str]) -> tuple[Tensor, Tensor | None]:
        """The A matrices of neighbouring sites as one (sum of stored ranks, D) view, and its gradient."""
        first = self._places[sites[0]]
        stored = sum(self._places[s].stored for s in sites)
        whole = replace(first, stored=stored)
        return whole.a(self._compute_P), None if self.gradients_P is None else whole.a(self.gradients_P)


def lay_out(shape: SlotShape, facts: ModelFacts) -> Layout:
    """The places of all sites; those of a stack are neighbours. Raises AdapterError adapter-target-missing,
    adapter-rank.
    """
    ordered = [
        site_name(layer, module)
        for layer in range(facts.layers)
        for modules in STACKS.values()
        for module in modules
        if site_name(layer, module) in shape.sites
    ]
    unknown = sorted(set(shape.sites) - set(ordered))
    if unknown or not ordered:
        raise AdapterError(
            "adapter-target-missing",
            f"the base ({facts.layers} layers) has no matrix named {unknown[0]}" if unknown else "no matrix is adapted",
            got=f"{len(unknown)} of {len(shape.sites)} targets are unknown",
            hint="the adapter belongs to another base; choose its own base, or other targets",
        )
    sizes = {site: facts.linear_shape(parse_site(site)[1]) for site in ordered}
    a_total = sum(_stored(shape.sites[site].rank) * sizes[site][1] for site in ordered)
    places, a_next, b_next = {}, 0, a_total
    for site in ordered:
        rank, (outputs, inputs) = shape.sites[site].rank, sizes[site]
        if not 1 <= rank <= min(outputs, inputs):
            raise AdapterError(
                "adapter-rank",
                f"rank {rank} does not fit {site}, a {outputs} x {inputs} matrix",
                hint=f"choose a rank from 1 to {min(outputs, inputs)}",
            )
        stored = _stored(rank)
        places[site] = _Place(a_next, b_next, rank, stored, inputs, outputs)
        a_next, b_next = a_next + stored * inputs, b_next + stored * outputs
    return Layout(shape, places, a_total, b_next)


def _stored(rank: int) -> int:
    return -(-rank // RANK_STEP) * RANK_STEP


def _make_groups(slot: Slot, facts: ModelFacts) -> dict[tuple[int, str], LoraGroup]:
    """The slot's matrices as the kernel wants them: per layer and stacked weight."""
    groups = {}
    for layer in range(facts.layers):
        for salt, (stack, modules) in enumerate(STACKS.items()):
            members, sites, out, rank_start = [], [], 0, 0
            for index, module in enumerate(modules):
                site, out_start = site_name(layer, module), out
                out += facts.linear_shape(module)[0]
                if site not in slot.shape.sites:
                    continue
                place, b_OR, grad_b_OR = slot.group_member(site)
                rank_stop = rank_start + place.stored
                scale = slot.shape.sites[site].scale
                members.append(LoraMember(b_OR, grad_b_OR, out_start, out, rank_start, rank_stop, scale, index))
                sites.append(site)
                rank_start = rank_stop
            if sites:
                a_RD, grad_a_RD = slot.stacked_a(sites)
                dropout_salt = layer * len(STACKS) + salt
                groups[layer, stack] = LoraGroup(a_RD, grad_a_RD, tuple(members), slot.shape.dropout, dropout_salt)
    return groups


class AdapterBank:
    """Slots by number over one frozen base. A batch names the slot of each of its rows (NO_SLOT: the bare base)."""

    def __init__(self, facts: ModelFacts, *, dtype: torch.dtype, device: torch.device) -> None:
        """dtype: what the decoder computes in; parameters stay fp32 whatever it is."""
        self.facts, self.dtype, self.device = facts, dtype, device
        self.slots: dict[int, Slot] = {}
        self.tables = SiteTables(facts, device)
        self._least_slots = 0
        self._stale = True
        self._last_segments: tuple[Segment, ...] = ()
        self._last_lows: dict[tuple[int, str], LowRank | None] = {}
        self._bounds = {stack: _stack_bounds(facts, modules) for stack, modules in STACKS.items()}

    def add(self, name: str, shape: SlotShape, *, trained: bool) -> int:
        """Make a slot, all zeros (an adapter that changes nothing); returns its number, the lowest free one.

        Raises AdapterError adapter-target-missing, adapter-rank.
        """
        layout = lay_out(shape, self.facts)
        parameters_P = torch.zeros(layout.elements, dtype=torch.float32, device=self.device)
        slot = Slot(
            name,
            layout,
            self.facts,
            parameters_P=parameters_P,
            gradients_P=torch.zeros_like(parameters_P) if trained else None,
            compute_P=None if self.dtype == torch.float32 else parameters_P.to(self.dtype),
        )
        return self.attach(slot)

    def attach(self, slot: Slot) -> int:
        """Take in a slot that was made elsewhere, on the bank's device and in its dtype; returns its number, the lowest
        free one. Nothing is copied, and no other slot is touched.
        """
        number = next(i for i in range(len(self.slots) + 1) if i not in self.slots)
        self.slots[number] = slot
        self._forget()
        return number

    def remove(self, number: int) -> None:
        """Free a slot; batches that name it are refused from then on."""
        del self.slots[number]
        self._forget()

    def _forget(self) -> None:
        """Other slots are in the bank now."""
        self._stale = True
        self._last_segments, self._last_lows = (), {}

    def keep_room(self, slots: int) -> None:
        """Let the tables that kernels read stay where they are while there are no more slots than this."""
        self._least_slots = slots

    def bounds(self, stack: str) -> tuple[int, ...]:
        """Where each module's outputs begin in a stacked weight, and the end."""
        return self._bounds[stack]

    @property
    def table_slots(self) -> int:
        """How many slots the tables have room for."""
        return max([self._least_slots, *(number + 1 for number in self.slots)])

    def lowest_layer(self, batch: Batch) -> int:
        """See `models.decoder.Bank.lowest_layer`."""
        slots = [self.slots[segment.slot] for segment in batch.segments if segment.slot >= 0]
        return min((slot.lowest_layer for slot in slots if slot.gradients_P is not None), default=self.facts.layers)

    def rider(self, batch: Batch) -> Rider | None:
        """See `models.decoder.Bank.rider`."""
        if len(batch.segments) != 1 or batch.segments[0].slot < 0:
            return None
        slot = self.slots[batch.segments[0].slot]
        return None if slot.shape.dropout > 0.0 else Rider((slot.identity, slot.version), slot.groups)

    def low_rank(self, layer: int, stack: str, batch: Batch, routes: Routes | None) -> LowRank | None:
        """See `models.decoder.Bank.low_rank`. Raises KeyError for a slot that is not in the bank.

        While sequences decode, one pass is like the next: what belongs to the last one's segments is kept.
        """
        if routes is not None or batch.draw_T is not None:
            return self._make_low_rank(layer, stack, batch, routes)
        if batch.segments != self._last_segments:
            self._last_segments, self._last_lows = batch.segments, {}
        if (layer, stack) not in self._last_lows:
            self._last_lows[layer, stack] = self._make_low_rank(layer, stack, batch, None)
        return self._last_lows[layer, stack]

    def _make_low_rank(self, layer: int, stack: str, batch: Batch, routes: Routes | None) -> LowRank | None:
        parts = []
        for segment in batch.segments:
            if segment.slot < 0:
                continue
            group = self.slots[segment.slot].groups.get((layer, stack))
            if group is None:
                continue
            dropped = batch.draw_T is not None and group.dropout > 0.0
            draw_T = batch.draw_T[segment.start : segment.stop] if dropped and batch.draw_T is not None else None
            parts.append(LoraPart(group, segment.start, segment.stop, draw_T))
        if not parts:
            return None
        width = max(part.group.a_RD.shape[0] for part in parts)
        rank = max(m.rank_stop - m.rank_start for part in parts for m in part.group.members)
        # Rows of whole 32 bytes, which the kernels read fastest.
        width = -(-width // 16) * 16
        if routes is not None:
            self.fill_tables()
        table_SF = None if routes is None else self.tables.at(layer, stack)
        return LowRank(tuple(parts), self._bounds[stack], width, rank, routes, table_SF)

    def fill_tables(self) -> None:
        """Bring the tables up to date."""
        if self._stale:
            self.tables.fill(self.slots, self.table_slots)
        self._stale = False


def _stack_bounds(facts: ModelFacts, modules: tuple[str, ...]) -> tuple[int, ...]:
    """Where each module's outputs begin in a stacked weight, and the end."""
    bounds = [0]
    for module in modules:
        bounds.append(bounds[-1] + facts.linear_shape(module)[0])
    return tuple(bounds)


def initialise(slot: Slot, kind: Initialisation, seed: int) -> None:
    """Fill every A at random, as a function of (seed, site) alone; every B is zero, so that training starts at the
    base.

    kaiming: uniform in +-1/sqrt(D) (PEFT's default: Kaiming with a = sqrt 5); gaussian: normal with deviation 1/R
    (PEFT's "gaussian"); orthogonal: orthonormal rows.
    """
    for site, (a_RD, b_OR) in slot.matrices().items():
        generator = torch.Generator().manual_seed(_site_seed(seed, site))
        rank, inputs = a_RD.shape
        if kind == "kaiming":
            fresh = (torch.rand(rank, inputs, generator=generator) * 2 - 1) / inputs**0.5
        elif kind == "gaussian":
            fresh = torch.randn(rank, inputs, generator=generator) / rank
        else:
            fresh = torch.linalg.qr(torch.randn(inputs, rank, generator=generator))[0].t()
        a_RD.copy_(fresh)
        b_OR.zero_()
    slot.refresh()


def _site_seed(seed: int, site: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{site}".encode()).digest()[:7])
