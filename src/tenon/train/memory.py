"""How much of the device's memory a run's steps take: decided before the first one, and again whenever it runs out.

The plan chose from the machine's free memory; here base and slots are loaded, and what is left is measured. What layers
keep may change at any time without changing a bit of the result. How many tokens are computed at once may not: it stays
as planned (or as a checkpoint says) as long as any way of keeping layers fits.
This module does not know what a step computes.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from tenon.errors import TrainError
from tenon.kernels.gpu_errors import first_line, is_out_of_memory
from tenon.models.layer import Keep
from tenon.plan.activations import attention_room
from tenon.plan.fit import ROOM_SHARE
from tenon.plan.keeping import Chosen, Room, Steps, choose_keeping, describe_use, keep_same, tighten
from tenon.plan.memory import state_bytes
from tenon.plan.values import Keeping
from tenon.train.slot import SlotTraining
from tenon.train.step import StepOptions
from tenon.units import format_bytes

# What a GPU's libraries take for kernels that are loaded with the first steps.
LIBRARY_BYTES = 400_000_000


class Emit(Protocol):
    """Writes one event of the run."""

    def __call__(self, kind: str, /, **fields: str | float | bool | None) -> object: ...


class DeviceMemory(Protocol):
    """A device's memory, as one process sees it."""

    def held_bytes(self) -> int:
        """What this process's tensors take."""
        ...

    def free_bytes(self) -> int:
        """What they could take more: what nobody has, and what this process has and does not use."""
        ...

    def release(self) -> None:
        """Give back what is not used."""
        ...

    def limit(self, size_bytes: int) -> None:
        """Never take more than so much from now on."""
        ...


class GpuMemory:
    """The memory of a GPU, through torch's allocator."""

    def __init__(self, device: torch.device) -> None:
        # The allocator's own limit is set by number alone: `cuda` is the GPU that this process is on.
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)

    def held_bytes(self) -> int:
        """See `DeviceMemory`."""
        return torch.cuda.memory_allocated(self._device)

    def free_bytes(self) -> int:
        """See `DeviceMemory`."""
        free, _ = torch.cuda.mem_get_info(self._device)
        return free + torch.cuda.memory_reserved(self._device) - self.held_bytes()

    def release(self) -> None:
        """See `DeviceMemory`. What an exception's traceback held may be held by cycles yet."""
        gc.collect()
        torch.cuda.empty_cache()

    def limit(self, size_bytes: int) -> None:
        """See `DeviceMemory`; the allocator itself refuses more."""
        _, total = torch.cuda.mem_get_info(self._device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, size_bytes / total), self._device)


class StepMemory(Protocol):
    """What the loop asks: how steps are to be made."""

    def settle(self, options: StepOptions) -> StepOptions:
        """Before the first step: as planned, or as the measured memory allows. Raises TrainError train-memory."""
        ...

    def tighten(self, options: StepOptions, *, step: int, reason: str) -> StepOptions:
        """After memory ran out in a step: with less. Raises TrainError train-memory when there is no such way."""
        ...


class AsPlanned:
    """Steps are made as they were planned: on a CPU, where memory that runs out cannot be caught."""

    def settle(self, options: StepOptions) -> StepOptions:
        """See `StepMemory`."""
        return options

    def tighten(self, options: StepOptions, *, step: int, reason: str) -> StepOptions:
        """See `StepMemory`."""
        del options
        raise _too_small(f"there was no memory left at step {step}", reason)


AS_PLANNED: StepMemory = AsPlanned()


@dataclass(frozen=True, slots=True)
class Limits:
    """What the run may take. device_bytes: None for all that is free. host_bytes: for layers' inputs."""

    device_bytes: int | None
    host_bytes: float


class Measured:
    """Steps are made as the measured memory allows."""

    def __init__(
        self,
        steps: Steps,
        memory: DeviceMemory,
        slots: Sequence[SlotTraining],
        *,
        keeping: Keeping,
        limits: Limits,
        emit: Emit,
        libraries_bytes: int = LIBRARY_BYTES,
    ) -> None:
        """keeping: as planned. slots: whose optimisers will take memory with their first step. libraries_bytes: what is
        loaded with the first steps beside.
        """
        self._steps, self._memory, self._slots, self._limits = steps, memory, slots, limits
        self._keeping, self._emit, self._libraries_bytes = keeping, emit, libraries_bytes

    def settle(self, options: StepOptions) -> StepOptions:
        """See `StepMemory`."""
        self._memory.release()
        if self._limits.device_bytes is not None:
            self._memory.limit(self._limits.device_bytes)
        self._steps = with_attention_room(self._steps, self._usable_bytes())
        room = self._room(self._libraries_bytes)
        chosen = keep_same(self._steps, options.micro_tokens, room)
        if not chosen.fits:
            smaller = self._smaller(options.micro_tokens, room)
            if smaller is None:
                raise self._refusal(chosen, room)
            self._warn(f"{options.micro_tokens:,} tokens at once do not fit the memory that is free", smaller)
            chosen = smaller
        return self._take(chosen, options, step=None)

    def tighten(self, options: StepOptions, *, step: int, reason: str) -> StepOptions:
        """See `StepMemory`."""
        self._memory.release()
        current = self._keeping.model_copy(update={"micro_tokens": options.micro_tokens})
        room = self._room(0)
        chosen = tighten(self._steps, current, room)
        if chosen is None:
            raise _too_small(
                f"there was no memory left at step {step}, and no smaller way to make it fits",
                f"{format_bytes(self._memory.free_bytes())} free beside base and adapters; {reason}",
            )
        self._warn(f"there was no memory left at step {step}, which is made again", chosen)
        return self._take(chosen, options, step=step)

    def _smaller(self, micro_tokens: int, room: Room) -> Chosen | None:
        """The best with fewer tokens at once."""
        fewer = replace(self._steps, micro_tokens=None, most_tokens=micro_tokens // 2)
        chosen = choose_keeping(fewer, room)
        return chosen if chosen.fits and chosen.keeping.micro_tokens < micro_tokens else None

    def _take(self, chosen: Chosen, options: StepOptions, *, step: int | None) -> StepOptions:
        """step: in which memory ran out."""
        self._keeping = chosen.keeping
        used, usable = self._held_bytes() + chosen.peak_bytes, self._usable_bytes()
        self._emit(
            "memory",
            text=describe_use(chosen.keeping, used, usable),
            used_bytes=used,
            usable_bytes=usable,
            step=step,
            **chosen.keeping.model_dump(),
        )
        return replace(
            options,
            micro_tokens=chosen.keeping.micro_tokens,
            keep=layer_keeps(chosen.keeping, self._steps.of.facts.layers),
            attention_bytes=self._steps.of.attention_bytes,
        )

    def _warn(self, what: str, chosen: Chosen) -> None:
        used = self._held_bytes() + chosen.peak_bytes
        text = f"{what}: {describe_use(chosen.keeping, used, self._usable_bytes())}"
        self._emit("warning", code="train-memory-short", text=text)

    def _room(self, libraries_bytes: int) -> Room:
        return room_of(self._memory, self._limits, coming_bytes=self._coming_bytes(), libraries_bytes=libraries_bytes)

    def _held_bytes(self) -> int:
        return self._memory.held_bytes() + self._coming_bytes()

    def _usable_bytes(self) -> int:
        usable = self._memory.held_bytes() + self._memory.free_bytes()
        return usable if self._limits.device_bytes is None else min(usable, self._limits.device_bytes)

    def _coming_bytes(self) -> int:
        """What the optimisers do not hold yet: their state is made in their first step."""
        coming = 0
        for t in self._slots:
            state = t.optimizer.state().values()
            wanted = t.slot.parameters_P.numel() * state_bytes(t.plan.optimizer)
            coming += max(0, wanted - sum(tensor.numel() * tensor.element_size() for tensor in state))
        return coming

    def _refusal(self, smallest: Chosen, room: Room) -> TrainError:
        least = choose_keeping(replace(self._steps, micro_tokens=None), room)
        need = min(smallest.peak_bytes, least.peak_bytes) / ROOM_SHARE
        return _too_small(
            f"a step needs about {format_bytes(need)} beside base and adapters, and "
            f"{format_bytes(max(0.0, room.device_bytes))} may be used",
            f"{format_bytes(self._held_bytes())} for base and adapters",
        )


def room_of(memory: DeviceMemory, limits: Limits, *, coming_bytes: int, libraries_bytes: int) -> Room:
    """What steps may take of what is left. coming_bytes: what tensors will take beside. libraries_bytes: what is not
    loaded yet, and comes out of what is free.
    """
    left = memory.free_bytes() - libraries_bytes
    if limits.device_bytes is not None:
        left = min(left, limits.device_bytes - memory.held_bytes())
    return Room(ROOM_SHARE * (left - coming_bytes), limits.host_bytes)


def with_attention_room(steps: Steps, usable_bytes: float) -> Steps:
    """The steps with the room that attention has on a device with so much memory for this process."""
    room = attention_room(usable_bytes, steps.machine.capability)
    return replace(steps, of=replace(steps.of, attention_bytes=room))


def layer_keeps(keeping: Keeping, layers: int) -> tuple[Keep, ...]:
    """What each layer of a base keeps, as the decoder takes it."""
    return tuple(Keep(level) for level in keeping.levels(layers))


@contextmanager
def memory_errors(*, resume: str) -> Iterator[None]:
    """Work that nobody can do with less memory: that there was none leaves as TrainError train-memory.

    resume: the command that goes on with this work.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise _too_small("the GPU has no memory left", first_line(error), resume=resume) from error


def _too_small(what: str, got: str, *, resume: str = "tenon resume RUN") -> TrainError:
    return TrainError(
        "train-memory",
        what,
        got=got,
        hint="end what else uses the GPU (`nvidia-smi` lists it) and "
        f"{resume}; or train again with data.max_tokens lower, precision.base=nf4, memory=auto or checkpointing=auto",
    )
