"""Adapters that are ready for the bank: checked, laid out as a slot has them, in the dtype that is computed in.

    files  --make_ready-->  host memory  --Mover.start-->  a slot on the bank's device

All of it is done beside the thread that owns the bank, which then only takes the finished slot in. On a CPU there is
nothing to copy: the tensor that was made ready is the slot's. To a GPU it is copied from pinned memory on a stream of
its own, and the slot has arrived when that stream says so.

Shape legend: P stored elements of a slot. This module does not know registries, nor who waits for an adapter.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tenon.adapters.bank import Layout, Slot, lay_out
from tenon.adapters.peft_files import AdapterFiles, copy_matrices
from tenon.bases.facts import ModelFacts
from tenon.errors import AdapterError


@dataclass(frozen=True, slots=True)
class BankKind:
    """Where a bank's slots live and what they are computed in."""

    facts: ModelFacts
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True, eq=False)
class ReadyAdapter:
    """An adapter in host memory (pinned, where it is to go to a GPU). slot: on a CPU, over that very memory."""

    label: str
    layout: Layout
    flat_P: Tensor
    slot: Slot | None

    @property
    def size_bytes(self) -> int:
        """Of its matrices as they are stored: its own rank decides, not the largest of all."""
        return self.flat_P.numel() * self.flat_P.element_size()


class Arrival(Protocol):
    """A slot on its way to the bank's device."""

    @property
    def done(self) -> bool:
        """Whether it is there. Never waits."""
        ...

    def slot(self) -> Slot:
        """The slot, for the thread and the stream that compute; only once it is `done`, and once."""
        ...


class Mover(Protocol):
    """Brings adapters from host memory to the bank's device. in_place: the slot is the memory itself, not a copy."""

    in_place: bool

    def start(self, ready: ReadyAdapter, /) -> Arrival:
        """Begin; never waits."""
        ...

    def close(self) -> None:
        """Move nothing more."""
        ...


def make_mover(kind: BankKind) -> Mover:
    """How adapters come to a device."""
    return CopyAside(kind) if kind.device.type == "cuda" else InPlace()


@dataclass(frozen=True, slots=True)
class Arrived:
    """A slot that is there."""

    arrived: Slot
    done: bool = True

    def slot(self) -> Slot:
        """See `Arrival.slot`."""
        return self.arrived


class InPlace:
    """Nothing moves: host memory is where slots live."""

    in_place = True

    def start(self, ready: ReadyAdapter, /) -> Arrival:
        """See `Mover.start`."""
        assert ready.slot is not None
        return Arrived(ready.slot)

    def close(self) -> None:
        """Nothing to close."""


class CopyAside:
    """Copies on a stream of its own, asked for by a thread of its own: making a slot's views takes milliseconds too."""

    in_place = False

    def __init__(self, kind: BankKind) -> None:
        self._kind, self._stream = kind, torch.cuda.Stream(kind.device)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="slot-copies")

    def start(self, ready: ReadyAdapter, /) -> Arrival:
        """See `Mover.start`."""
        return _Copying(self._thread.submit(self._copy, ready))

    def close(self) -> None:
        """See `Mover.close`."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _copy(self, ready: ReadyAdapter) -> _Copy:
        with torch.cuda.stream(self._stream):
            flat_P = ready.flat_P.to(self._kind.device, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        return _Copy(Slot(ready.label, ready.layout, self._kind.facts, parameters_P=flat_P), event, ready)


@dataclass(frozen=True, slots=True)
class _Copy:
    """event: reached when the copy is complete. source: kept until then, for the copy reads it."""

    slot: Slot
    event: torch.cuda.Event
    source: ReadyAdapter


@dataclass(frozen=True, slots=True)
class _Copying:
    """A copy that has been asked for."""

    asked: Future[_Copy]

    @property
    def done(self) -> bool:
        """See `Arrival.done`. Raises what asking raised."""
        return self.asked.done() and self.asked.result().event.query()

    def slot(self) -> Slot:
        """See `Arrival.slot`."""
        copy = self.asked.result()
        stream = torch.cuda.current_stream(copy.slot.parameters_P.device)
        stream.wait_event(copy.event)
        # The memory belongs to the copying stream: without this, a later copy might be given it while passes that were
        # begun before the slot was freed still read it.
        copy.slot.parameters_P.record_stream(stream)
        return copy.slot


def make_ready(label: str, files: AdapterFiles, kind: BankKind) -> ReadyAdapter:
    """Lay an adapter out as a slot of the bank would have it.

    Raises AdapterError adapter-target-missing, adapter-rank, adapter-tensors (it does not fit the base),
    adapter-not-finite (a weight is beyond what the compute dtype can hold).
    """
    layout = lay_out(files.shape, kind.facts)
    # Zeros, not empty: what fills ranks up must be zero.
    flat_P = torch.zeros(layout.elements, dtype=kind.dtype, pin_memory=kind.device.type == "cuda")
    copy_matrices(files, layout.views(flat_P), label)
    widest = max(torch.finfo(matrix.dtype).max for pair in files.matrices.values() for matrix in pair)
    if widest > torch.finfo(kind.dtype).max and not bool(torch.isfinite(flat_P).all()):
        raise AdapterError(
            "adapter-not-finite",
            f"{label} holds weights that are beyond what {str(kind.dtype).removeprefix('torch.')} can hold",
            hint="train the adapter again with a lower learning rate",
        )
    own = kind.device.type == "cpu"
    slot = Slot(label, layout, kind.facts, parameters_P=flat_P) if own else None
    return ReadyAdapter(label, layout, flat_P, slot)
