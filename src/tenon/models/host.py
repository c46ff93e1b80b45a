"""Activations that wait in the host's memory for the way back, copied beside the computation.

Layers are put away in order and taken back in the reverse one: while one is used, the next one down is already on its
way. On a CPU there is only one memory, and nothing is copied. This module does not know what the tensors mean.
"""

from __future__ import annotations

import torch
from torch import Tensor


class HostStore:
    """Tensors by number, in the host's memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._kept: dict[int, Tensor] = {}
        self._coming: dict[int, tuple[Tensor, torch.cuda.Event]] = {}

    def __contains__(self, number: int) -> bool:
        return number in self._kept or number in self._coming

    def put(self, number: int, tensor: Tensor) -> None:
        """Start copying a tensor out; it may be let go of at once."""
        if self._stream is None:
            self._kept[number] = tensor
            return
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host.copy_(tensor, non_blocking=True)
        # The allocator must not hand the tensor's memory on before the copy is done.
        tensor.record_stream(self._stream)
        self._kept[number] = host

    def take(self, number: int) -> Tensor:
        """The tensor on the device again; the one put before it starts on its way back."""
        if self._stream is None:
            return self._kept.pop(number)
        if number not in self._coming:
            self._fetch(number)
        if number - 1 in self._kept:
            self._fetch(number - 1)
        tensor, arrived = self._coming.pop(number)
        torch.cuda.current_stream(self._device).wait_event(arrived)
        return tensor

    def _fetch(self, number: int) -> None:
        assert self._stream is not None
        kept = self._kept.pop(number)
        tensor = torch.empty(kept.shape, dtype=kept.dtype, device=self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            tensor.copy_(kept, non_blocking=True)
        tensor.record_stream(self._stream)
        arrived = torch.cuda.Event()
        arrived.record(self._stream)
        self._coming[number] = (tensor, arrived)
