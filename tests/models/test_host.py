"""Activations in the host's memory come back as they were, and leave the device's memory to others meanwhile."""

from __future__ import annotations

import pytest
import torch

from tenon.models.host import IN_FLIGHT, HostStore


def test_on_a_cpu_nothing_is_copied() -> None:
    store, tensors = HostStore(torch.device("cpu")), [torch.randn(3) for _ in range(4)]
    for number, tensor in enumerate(tensors):
        store.put(number, tensor)
    assert all(number in store for number in range(4))
    for number in reversed(range(4)):
        assert store.take(number) is tensors[number]
    assert 0 not in store


@pytest.mark.gpu
def test_many_go_out_and_come_back_while_few_are_on_the_device() -> None:
    device, rows = torch.device("cuda"), 1_000_000
    store, numbers = HostStore(device), 40
    torch.cuda.synchronize()
    # What is empty of other tests' memory would count as reserved here.
    torch.cuda.empty_cache()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    x = torch.zeros(rows, device=device)
    for number in range(numbers):
        x = x + 1  # a tensor of its own, as a layer's output is
        store.put(number, x)
    del x
    for number in reversed(range(numbers)):
        found = store.take(number)
        assert bool((found == number + 1).all())
        del found
    one = 4 * rows
    assert torch.cuda.max_memory_allocated() - allocated <= (IN_FLIGHT + 3) * one
    assert torch.cuda.max_memory_reserved() - reserved <= 4 * (IN_FLIGHT + 3) * one
