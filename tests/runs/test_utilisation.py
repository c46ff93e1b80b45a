"""When GPUs wait, and for what: from synthetic steps and samples."""

from __future__ import annotations

import pytest

from tenon.runs.events import Event
from tenon.runs.utilisation import WARM_STEPS, WINDOW_SECONDS, UtilisationWatch, Verdict


def run_steps(
    watch: UtilisationWatch,
    *,
    count: int = 60,
    percent: float,
    seconds: float = 1.0,
    data_seconds: float = 0.0,
    tokens: int = 8192,
    gap: float = 0.0,
    slots: int = 1,
    start: float = 1000.0,
) -> list[Verdict]:
    """Steps one after another, with four samples in each; between two of them an idle sample when there is a gap."""
    verdicts = []
    now = start
    for number in range(count):
        for quarter in range(4):
            watch.take_sample(now + (quarter + 0.5) * seconds / 4, percent)
        now += seconds
        for slot in range(slots):
            event: Event = {
                "t": now + 0.0001 * slot, "kind": "step", "slot": f"s{slot}", "step": number + 1, "tokens": tokens,
                "seconds": seconds + 1e-6 * number, "data_seconds": data_seconds,
            }  # fmt: skip
            if (verdict := watch.take_step(event)) is not None:
                verdicts.append(verdict)
        if gap:
            watch.take_sample(now + gap / 2, 0.0)
            now += gap
    return verdicts


def test_a_busy_gpu_is_no_matter() -> None:
    assert run_steps(UtilisationWatch(micro_tokens=4096), percent=80.0) == []


@pytest.mark.parametrize(
    ("data_seconds", "tokens", "cause", "words"),
    [
        (0.5, 8192, "data", "wait for their rows 50.0% of the time"),
        (0.3, 512, "data", "rows"),
        (0.05, 512, "batch", "a step has 512 tokens where 4,096 fit at once"),
        (0.05, 8192, "host", "host is too slow"),
    ],
)
def test_the_cause_follows_from_measured_shares(data_seconds: float, tokens: int, cause: str, words: str) -> None:
    watch = UtilisationWatch(micro_tokens=4096)
    verdicts = run_steps(watch, percent=50.0, data_seconds=data_seconds, tokens=tokens)
    assert len(verdicts) >= 2 and {verdict.cause for verdict in verdicts} == {cause}
    assert words in verdicts[0].text and "busy 50% of the time" in verdicts[0].text


def test_idling_between_steps_is_not_held_against_them() -> None:
    """A checkpoint or a validation leaves the GPU to itself, or keeps it busy with something else."""
    assert run_steps(UtilisationWatch(micro_tokens=4096), percent=95.0, gap=5.0) == []


def test_slots_that_share_a_step_count_it_once_and_their_tokens_together() -> None:
    watch = UtilisationWatch(micro_tokens=4096)
    verdicts = run_steps(watch, percent=40.0, tokens=1500, slots=3, count=int(WINDOW_SECONDS) + WARM_STEPS + 2)
    assert len(verdicts) == 1 and verdicts[0].cause == "host"
    watch = UtilisationWatch(micro_tokens=4096)
    assert run_steps(watch, percent=40.0, tokens=1000, slots=3)[0].cause == "batch"


def test_too_little_says_nothing() -> None:
    watch = UtilisationWatch(micro_tokens=4096)
    assert run_steps(watch, percent=0.0, count=int(WINDOW_SECONDS)) == []


def test_the_first_steps_compile_and_do_not_count() -> None:
    watch = UtilisationWatch(micro_tokens=4096)
    run_steps(watch, percent=0.0, count=WARM_STEPS, seconds=100.0)
    assert run_steps(watch, percent=95.0, start=2000.0) == []


def test_steps_without_samples_give_no_verdict() -> None:
    """No NVML: nothing is claimed."""
    watch = UtilisationWatch(micro_tokens=4096)
    for number in range(100):
        event: Event = {"t": 1000.0 + number, "kind": "step", "seconds": 1.0 + number * 1e-6, "data_seconds": 0.9}
        assert watch.take_step(event) is None
