"""Small work on a CPU: in one thread, because waking a second one and waiting for it takes longer than the work does.

Threads here sleep while they wait (OMP_WAIT_POLICY=PASSIVE: those that spin are many times slower as soon as anything
else wants a core). To fork and to join then takes some 100 microseconds, in which one core makes about ten million
multiplications and additions in fp32; torch forks from a few thousand on. Measured by `benchmarks/small_work.py`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

# Multiplications from which more than one thread pays, and how many an element takes as long as, of what is no product.
WORTH_THREADS = 8_000_000
NORM_ELEMENT, ROTARY_ELEMENT, SWIGLU_ELEMENT = 6, 8, 12


class _OneThread:
    """While it lasts, torch computes in the thread that asks for it."""

    __slots__ = ("_usual",)

    def __enter__(self) -> None:
        self._usual = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_error: object) -> None:
        torch.set_num_threads(self._usual)


_ALL = nullcontext()


def threads_for(multiplications: int) -> AbstractContextManager[None]:
    """The threads that so many multiplications on a CPU are worth, or what takes as long."""
    return _OneThread() if multiplications < WORTH_THREADS else _ALL
