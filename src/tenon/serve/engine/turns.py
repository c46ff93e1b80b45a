"""Who gets which place when more adapters are asked for than there are places: a decision, and nothing done.

Whatever waits is served in the order in which its oldest sequence came:

1. A place that is empty, or that nobody uses or is promised, goes to the first that waits and is at hand.
2. Who has waited for `wait_seconds` is overdue. For each adapter that is overdue and got no place, the place that has
   been in service for longest is closed: it lets in no sequence that came after the overdue one, so it runs dry and
   changes hands. Nothing that runs is cut, and who is shut out waits in the order of arrival like everybody else.
3. A place that is empty is kept for who is overdue and still being read.

So nobody waits for ever. Let T be the longest time that a sequence keeps its place, L the longest time that an adapter
takes to be read, brought in and checked, and p how many adapters were waited for when a sequence came, its own among
them. Then it is let in, as far as adapters are concerned, after at most

    wait_seconds + ceil(p / places) T + (p + 1) L

Why: once it is overdue, so are all p, min(p, places) places are closed, and each runs dry within T; adapters are read
one after the other in that same order, after the one that is just being read. Each of them needs one turn, for all of
its sequences that wait are let in at once. What comes later cannot pass an overdue sequence, so p never grows.
Not in the bound: the wait for one of the `--rows` or for cache, which the bare base has as well.

This module does not know tensors, threads, clocks or files.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from tenon.serve.jobs import AdapterRef


@dataclass(frozen=True, slots=True)
class Need:
    """An adapter that is waited for. number: of its oldest waiting sequence, smaller came earlier. since: when that
    came, in seconds.
    """

    adapter: AdapterRef
    number: int
    since: float


@dataclass(slots=True)
class Place:
    """A place that an adapter has. users: sequences that were let in. used: when it was last asked for, as a count.
    since: when it was given, as a count. fixed: it is not to change hands now (its adapter is still on its way).
    closed_to: sequences from this number on are not let in; None lets in all. promised_to: those below this number are
    in any case, for they waited when the place was given. open_since: since when, in seconds.
    """

    users: int
    used: int
    since: int
    fixed: bool = False
    closed_to: int | None = None
    promised_to: int = 0
    open_since: float = 0.0

    def admits(self, number: int) -> bool:
        """Whether a sequence may be let in, as far as turns are concerned."""
        return self.closed_to is None or number < max(self.closed_to, self.promised_to)


@dataclass(frozen=True, slots=True)
class Decision:
    """gives: in this order, a place to the adapter named first, from the one named second (None: an empty place).
    closed: places that are closed from now on, with the sequence that they are closed to; all others are open.
    """

    gives: list[tuple[str, str | None]] = field(default_factory=list)
    closed: dict[str, int] = field(default_factory=dict)


def decide(
    needs: Sequence[Need],
    places: Mapping[str, Place],
    *,
    slots: int,
    at_hand: Collection[str],
    now: float,
    wait_seconds: float,
) -> Decision:
    """needs: in the order of their numbers. places: by adapter. at_hand: adapters that need not be read any more."""
    waiting = {need.adapter.key: need for need in needs}
    idle = [key for key, place in places.items() if _is_idle(place, waiting.get(key))]
    # Rather one that nobody waits for, then the one that was not asked for longest.
    idle.sort(key=lambda key: (key in waiting, places[key].used))
    spare: list[str | None] = [*[None] * (slots - len(places)), *idle]
    decision, overdue = Decision(), list[Need]()
    for need in needs:
        key, late = need.adapter.key, now - need.since >= wait_seconds
        if key in places:
            continue
        if spare and key in at_hand:
            decision.gives.append((key, spare.pop(0)))
        elif spare and late:
            spare.pop(0)
        elif late:
            overdue.append(need)
    gone = {out for _, out in decision.gives}
    busy = [key for key, place in places.items() if key not in gone and key not in idle and not place.fixed]
    busy.sort(key=lambda key: places[key].since)
    decision.closed.update((key, need.number) for key, need in zip(busy, overdue, strict=False))
    return decision


def _is_idle(place: Place, need: Need | None) -> bool:
    """Whether nobody uses a place, and nobody who waits may."""
    return place.users == 0 and not place.fixed and (need is None or not place.admits(need.number))
