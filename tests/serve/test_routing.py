"""Where sequences go: bounded loads, and homes that stay when an engine goes."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenon.infer.requests import Request
from tenon.serve.jobs import AdapterRef, Ended, Event, Failed, Job
from tenon.serve.pool.routing import BOUND, choose, home_key, ranking

KEYS = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=200)


class Nowhere:
    def put(self, event: Event) -> None:
        raise AssertionError(isinstance(event, (Ended, Failed)))


def job(prompt: list[int], adapter: str | None = None, salt: str = "") -> Job:
    ref = None if adapter is None else AdapterRef(adapter, f"{adapter}@1")
    return Job(Request(prompt, salt=salt), ref, Nowhere())


@given(KEYS, st.integers(1, 8), st.sampled_from([1.0, BOUND, 2.0]))
def test_no_engine_that_is_chosen_has_more_than_its_bound(keys: list[str], engines: int, bound: float) -> None:
    loads = dict.fromkeys(range(engines), 0)
    for key in keys:
        chosen = choose(key, loads, bound=bound)
        loads[chosen] += 1
        assert loads[chosen] <= math.ceil(bound * sum(loads.values()) / engines)
    assert sum(loads.values()) == len(keys)


@given(KEYS, st.integers(2, 8), st.data())
def test_when_an_engine_goes_only_its_own_keys_move(keys: list[str], engines: int, data: st.DataObject) -> None:
    idle = dict.fromkeys(range(engines), 0)
    lost = data.draw(st.sampled_from(range(engines)))
    left = {engine: 0 for engine in idle if engine != lost}
    for key in keys:
        before = choose(key, idle)
        assert choose(key, left) == (ranking(key, idle)[1] if before == lost else before)


@given(KEYS, st.dictionaries(st.integers(0, 7), st.integers(0, 50), min_size=1))
def test_the_choice_is_the_best_home_that_is_not_too_busy(keys: list[str], loads: dict[int, int]) -> None:
    most = math.ceil(BOUND * (sum(loads.values()) + 1) / len(loads))
    for key in keys:
        chosen = choose(key, loads)
        better = ranking(key, loads)[: ranking(key, loads).index(chosen)]
        assert loads[chosen] < most and all(loads[engine] >= most for engine in better)


@pytest.mark.parametrize("engines", [2, 3, 8])
def test_homes_are_spread_evenly(engines: int) -> None:
    idle = dict.fromkeys(range(engines), 0)
    homes = Counter(choose(f"adapter {number}", idle) for number in range(4000))
    assert max(homes.values()) < 1.2 * 4000 / engines


def test_what_is_at_home_together() -> None:
    long = list(range(3, 60))
    assert home_key(job([5], "a")) == home_key(job([6, 7], "a", salt="x")) != home_key(job([5], "b"))
    assert home_key(job([*long, 1])) == home_key(job([*long, 2])) != home_key(job([9, *long]))
    assert home_key(job(long, salt="x")) != home_key(job(long, salt="y"))
