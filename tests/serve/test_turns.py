"""Whose turn it is: decided without threads or tensors, and held against the bound that `turns` states."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from tenon.infer.requests import Request
from tenon.serve.engine.turns import Decision, Need, Place, decide
from tenon.serve.engine.waiting import Waiter, WaitingJobs
from tenon.serve.jobs import AdapterRef, Event, Job


class Nowhere:
    """A mailbox that nobody reads."""

    def put(self, event: Event) -> None:
        del event


def need(key: str, number: int, since: float = 0.0) -> Need:
    return Need(AdapterRef(key, f"{key}@1"), number, since)


def place(*, users: int = 1, used: int = 0, since: int = 0, fixed: bool = False, closed_to: int | None = None) -> Place:
    return Place(users, used, since, fixed, closed_to)


def decided(needs: list[Need], places: dict[str, Place], *, slots: int = 2, at_hand: str = "xyz") -> Decision:
    return decide(needs, places, slots=slots, at_hand=set(at_hand), now=100.0, wait_seconds=10.0)


def test_an_empty_place_goes_before_an_idle_one_and_the_longest_unused_goes_first() -> None:
    places = {"a": place(users=0, used=2), "b": place(users=0, used=1)}
    needs = [need("x", 1), need("y", 2), need("z", 3)]
    assert decided(needs, places, slots=3).gives == [("x", None), ("y", "b"), ("z", "a")]


def test_nobody_who_runs_or_is_promised_a_place_is_put_out() -> None:
    promised = {"a": place(users=0), "b": place(users=1)}
    found = decided([need("a", 1, 95), need("x", 2, 95)], promised)
    assert found == Decision()


def test_who_is_at_hand_passes_who_is_read_until_that_one_is_overdue() -> None:
    places = {"a": place(users=0), "b": place()}
    assert decided([need("x", 1, 95), need("y", 2, 95)], places, at_hand="y").gives == [("y", "a")]
    found = decided([need("x", 1, 90), need("y", 2, 95)], places, at_hand="y")
    assert found.gives == [] and found.closed == {}, "the idle place is kept for x"


def test_the_place_longest_in_service_is_closed_for_who_is_overdue() -> None:
    places = {"a": place(since=5), "b": place(since=3), "c": place(since=1, fixed=True)}
    needs = [need("x", 7, 90), need("y", 8, 90.5)]
    assert decided(needs, places, slots=3).closed == {"b": 7}
    assert decided([need("x", 7, 80), need("y", 8, 85)], places, slots=3).closed == {"b": 7, "a": 8}


def test_a_closed_place_still_lets_in_what_came_before() -> None:
    closed = place(users=0, closed_to=7)
    assert closed.admits(6) and not closed.admits(7)
    other = {"b": place()}
    assert decided([need("a", 6, 80), need("x", 7, 90)], {"a": closed, **other}).gives == []
    assert decided([need("x", 7, 90), need("a", 8, 95)], {"a": closed, **other}).gives == [("x", "a")]


def test_all_that_waited_when_a_place_was_given_are_let_in() -> None:
    """Else sequences of two adapters that come in turns would have a turn each."""
    given = place(users=0, closed_to=7)
    given.promised_to = 9
    assert given.admits(8) and not given.admits(9)


# ---- any order of arrivals -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrival:
    at: int
    adapter: str
    lasts: int


@dataclass
class Works:
    """Places, a reader that reads one adapter at a time, and a clock that ticks; rows None: there is one for each."""

    slots: int
    wait: int
    reads: int
    moves: int
    rows: int | None
    forgets: bool
    now: int = 0
    places: dict[str, Place] = field(default_factory=dict)
    arrive_at: dict[str, int] = field(default_factory=dict)
    at_hand: set[str] = field(default_factory=set)
    reading: tuple[str, int] | None = None
    running: list[tuple[int, str]] = field(default_factory=list)
    turns: int = 0

    def __post_init__(self) -> None:
        self.waiting = WaitingJobs(lambda: float(self.now))

    def tick(self) -> list[Waiter]:
        """What happens at one instant; who was let in."""
        for end, key in [one for one in self.running if one[0] <= self.now]:
            self.running.remove((end, key))
            self.places[key].users -= 1
        self._read()
        self._settle()
        needs = self.waiting.needs()
        decision = decide(
            needs,
            self.places,
            slots=self.slots,
            at_hand=self.at_hand,
            now=self.now,
            wait_seconds=self.wait,
        )
        for key, out in decision.gives:
            if out is not None:
                assert self.places.pop(out).users == 0, "nothing that runs is cut"
                if self.forgets:
                    self.at_hand.discard(out)
            assert len(self.places) < self.slots and key not in self.places
            self.turns += 1
            self.places[key] = Place(0, self.turns, self.turns, fixed=True)
            self.arrive_at[key] = self.now + self.moves
        for key, one in self.places.items():
            one.closed_to = decision.closed.get(key)
        self._settle()
        return self._let_in()

    def _read(self) -> None:
        if self.reading is not None and self.reading[1] <= self.now:
            self.at_hand.add(self.reading[0])
            self.reading = None
        missing = [
            n.adapter.key
            for n in self.waiting.needs()
            if n.adapter.key not in self.places | dict.fromkeys(self.at_hand)
        ]
        if self.reading is None and missing:
            self.reading = (missing[0], self.now + self.reads)

    def _settle(self) -> None:
        for key, one in self.places.items():
            if one.fixed and self.arrive_at[key] <= self.now:
                one.fixed, one.promised_to = False, self.waiting.next_number

    def _let_in(self) -> list[Waiter]:
        found = []
        while self.rows is None or len(self.running) < self.rows:
            waiter = self.waiting.take(self._admits)
            if waiter is None:
                break
            assert waiter.job.adapter is not None
            key = waiter.job.adapter.key
            self.places[key].users += 1
            self.turns += 1
            self.places[key].used = self.turns
            self.running.append((self.now + waiter.job.request.max_new_tokens, key))
            found.append(waiter)
        return found

    def _admits(self, key: str | None, number: int) -> bool:
        assert key is not None
        one = self.places.get(key)
        return one is not None and not one.fixed and one.admits(number)


ARRIVALS = st.lists(
    st.builds(Arrival, st.integers(0, 40), st.sampled_from("abcdefgh"), st.integers(1, 12)), min_size=1, max_size=40
)
WORKS = st.builds(
    Works,
    slots=st.integers(1, 3),
    wait=st.integers(0, 15),
    reads=st.integers(0, 4),
    moves=st.integers(0, 2),
    rows=st.none(),
    forgets=st.booleans(),
)


def run(works: Works, arrivals: list[Arrival]) -> list[tuple[int, int]]:
    """(ticks waited, adapters that were before it) of every sequence; all must be let in."""
    left, ahead, waited = sorted(arrivals, key=lambda a: a.at), dict[int, int](), list[tuple[int, int]]()
    arrived = 0
    while left or len(works.waiting) or works.running:
        while left and left[0].at <= works.now:
            one = left.pop(0)
            job = Job(Request([1], max_new_tokens=one.lasts), AdapterRef(one.adapter, one.adapter), Nowhere())
            works.waiting.add(job)
            ahead[arrived] = len(works.waiting.needs())
            arrived += 1
        for waiter in works.tick():
            waited.append((works.now - int(waiter.since), ahead[waiter.number]))
        works.now += 1
        assert works.now < 5000, "somebody waits for ever"
    assert len(waited) == len(arrivals)
    return waited


@settings(max_examples=300, deadline=None)
@given(works=WORKS, arrivals=ARRIVALS)
def test_nobody_waits_longer_than_the_bound(works: Works, arrivals: list[Arrival]) -> None:
    longest, load = max(a.lasts for a in arrivals), works.reads + works.moves
    for waited, ahead in run(works, arrivals):
        assert waited <= works.wait + math.ceil(ahead / works.slots) * longest + (ahead + 1) * load


@settings(max_examples=100, deadline=None)
@given(works=WORKS, arrivals=ARRIVALS, rows=st.integers(1, 3))
def test_everybody_is_served_also_when_places_in_the_batch_are_few(
    works: Works, arrivals: list[Arrival], rows: int
) -> None:
    works.rows = rows
    run(works, arrivals)


def test_without_the_bound_one_adapter_that_never_pauses_keeps_its_place() -> None:
    """A guard: it is the closing that ends the waiting, and nothing else."""
    steady = [Arrival(at, "a", 4) for at in range(0, 40, 2)]

    def wait_of_b(wait: int) -> int:
        works = Works(slots=1, wait=wait, reads=0, moves=0, rows=None, forgets=False)
        left, found = [*steady, Arrival(3, "b", 4)], list[int]()
        while left or len(works.waiting):
            for one in [one for one in left if one.at <= works.now]:
                left.remove(one)
                job = Job(Request([1], max_new_tokens=one.lasts), AdapterRef(one.adapter, one.adapter), Nowhere())
                works.waiting.add(job)
            for waiter in works.tick():
                if waiter.job.adapter is not None and waiter.job.adapter.key == "b":
                    found.append(works.now - int(waiter.since))
            works.now += 1
        return found[0]

    assert wait_of_b(1000) >= 38 and wait_of_b(5) <= 5 + 4
