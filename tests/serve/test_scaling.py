"""How many engines there should be, with a clock of the test's own."""

from __future__ import annotations

from tenon.serve.pool.scaling import Scaler, ScaleRule

RULE = ScaleRule(
    least=1, most=3, up_delay_seconds=1.0, up_seconds=5.0, down_delay_seconds=0.1, down_seconds=60.0, down_share=0.7
)


def run(scaler: Scaler, delays: list[float], *, engines: int, first: float = 0.0, share: float = 0.0) -> list[int]:
    """What is decided each second."""
    found = []
    for second, delay in enumerate(delays):
        engines = scaler.decide(first + second, delay_seconds=delay, engines=engines, settled=True, share=share)
        found.append(engines)
    return found


def test_a_wait_that_lasts_brings_one_more_engine_at_a_time_up_to_the_most() -> None:
    found = run(Scaler(RULE), [2.0] * 30, engines=1, share=3.0)
    assert found[:5] == [1] * 5 and found[5] == 2 and found.index(3) == 11 and found[-1] == 3


def test_a_wait_that_ends_in_between_brings_none() -> None:
    assert set(run(Scaler(RULE), [2.0, 2.0, 2.0, 2.0, 0.5] * 10, engines=1, share=3.0)) == {1}


def test_one_goes_after_a_long_quiet_time_down_to_the_least() -> None:
    found = run(Scaler(RULE), [0.0] * 200, engines=3)
    assert found[59] == 3 and found[60] == 2 and found[120] == 2 and found[121] == 1 and found[-1] == 1


def test_none_goes_while_the_others_would_be_too_busy() -> None:
    assert set(run(Scaler(RULE), [0.0] * 200, engines=2, share=0.5)) == {2}, "half of two is all of one"
    assert run(Scaler(RULE), [0.0] * 61, engines=2, share=0.3)[-1] == 1


def test_between_the_two_waits_nothing_changes() -> None:
    assert set(run(Scaler(RULE), [0.5] * 300, engines=2)) == {2}


def test_while_one_comes_or_goes_nothing_is_decided_and_the_clock_begins_anew() -> None:
    scaler = Scaler(RULE)
    assert run(scaler, [2.0] * 5, engines=1, share=2.0)[-1] == 1
    assert scaler.decide(5.0, delay_seconds=9.0, engines=1, settled=False, share=2.0) == 1
    assert run(scaler, [2.0] * 6, engines=1, first=6.0, share=2.0) == [1] * 5 + [2]
