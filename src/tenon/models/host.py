"""Activations that wait in the host's memory for the way back, copied beside the computation.

Layers are put away in order and taken back in the reverse one: while one is used, the next one down is already on its
way. On a CPU there is only one memory, and nothing is copied.

A tensor that is being copied may not be written to by what is computed next. The host is far ahead of the device, so it
cannot ask whether a copy is done, and waiting for it would stop both: instead the last few tensors are held, and before
one of them is let go of, the computation is told to wait for its copy, which by then is long done. So only IN_FLIGHT
tensors are on the device at a time. This module does not know what the tensors mean.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

# Tensors that are held while they are copied out.
IN_FLIGHT = 2


class HostStore:
    """Tensors by number, in the host's memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._kept: dict[int, Tensor] = {}
        self._leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._coming: dict[int, tuple[Tensor, torch.cuda.Event]] = {}

    def __contains__(self, number: int) -> bool:
        return number in self._kept or number in self._coming

    def put(self, number: int, tensor: Tensor) -> None:
        """Start copying a tensor out; it may be let go of at once."""
        if self._stream is None:
            self._kept[number] = tensor
            return
        if len(self._leaving) == IN_FLIGHT:
            self._let_go()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._leaving.append((tensor, self._copy(host, tensor)))
        self._kept[number] = host

    def take(self, number: int) -> Tensor:
        """The tensor on the device again; the one put before it starts on its way back."""
        if self._stream is None:
            return self._kept.pop(number)
        while self._leaving:
            self._let_go()
        if number not in self._coming:
            self._fetch(number)
        if number - 1 in self._kept:
            self._fetch(number - 1)
        tensor, arrived = self._coming.pop(number)
        torch.cuda.current_stream(self._device).wait_event(arrived)
        return tensor

    def _fetch(self, number: int) -> None:
        kept = self._kept.pop(number)
        tensor = torch.empty(kept.shape, dtype=kept.dtype, device=self._device)
        self._coming[number] = (tensor, self._copy(tensor, kept))

    def _let_go(self) -> None:
        _, copied = self._leaving.popleft()
        torch.cuda.current_stream(self._device).wait_event(copied)

    def _copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        """Copy beside the computation, after what is computed so far; returns the event of its end."""
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return copied
