"""A window shared out among the ranks: which rank works on a row follows from the window and their number alone."""

from __future__ import annotations

from collections.abc import Sequence

from tenon.data.pack import PackRow


def share_rows(rows: Sequence[PackRow], number: int, count: int) -> list[PackRow]:
    """The rows of rank `number` of `count`, in the window's order: about as many tokens as each of the others.

    The longest row goes first, each to the rank that has the fewest tokens so far.
    """
    loads = [0] * count
    mine: list[int] = []
    for place in sorted(range(len(rows)), key=lambda place: (-len(rows[place].ids), place)):
        lightest = min(range(count), key=lambda rank: (loads[rank], rank))
        loads[lightest] += len(rows[place].ids)
        if lightest == number:
            mine.append(place)
    return [rows[place] for place in sorted(mine)]
