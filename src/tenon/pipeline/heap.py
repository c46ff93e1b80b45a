"""The heap of a process that is to answer for days."""

from __future__ import annotations

import gc


def settle_heap() -> None:
    """Spare the cycle collector what is there for good: call it when all is loaded.

    A full search of what torch and a tokenizer bring takes tenths of a second, in which no stream moves. What requests
    leave behind is searched as before.
    """
    gc.collect()
    gc.freeze()
