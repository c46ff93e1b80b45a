"""Grammars on their way to the engine: compiled by a thread of their own, so that no pass waits for one.

All but the compiling belongs to the engine's thread. This module knows no requests.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tenon.infer.guides import Guides


class Compiling:
    """Which grammars are at hand."""

    def __init__(self, guides: Guides[Any] | None, *, on_done: Callable[[], None]) -> None:
        """guides: None where no request has a grammar. on_done: called, by another thread, when one is at hand or has
        been refused.
        """
        self._guides, self._on_done = guides, on_done
        self._futures: dict[str, Future[None]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammars")

    def ready(self, grammar: str | None) -> bool:
        """Whether the engine can begin with it at once; if not, ask again. Raises TenonError where it is refused."""
        if grammar is None or self._guides is None:
            return True
        compiling = self._futures.get(grammar)
        if compiling is None:
            compiling = self._futures[grammar] = self._thread.submit(self._guides.check, grammar)
            compiling.add_done_callback(lambda _done: self._on_done())
        if not compiling.done():
            return False
        compiling.result()
        return True

    def forget_others(self, wanted: Collection[str | None]) -> None:
        """Compile nothing that nobody waits for any more."""
        for grammar in self._futures.keys() - set(wanted):
            self._futures.pop(grammar).cancel()

    def close(self) -> None:
        """Compile nothing more."""
        self._thread.shutdown(wait=False, cancel_futures=True)
