"""The event log: appended, tolerant of torn lines, followed live; trackers never stop a run."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from tenon.runs.events import Broadcast, Event, EventLog, curve, follow_events, read_events


class Recorder:
    """A sink that keeps what it is told; `fails` on the n-th event."""

    def __init__(self, fail_on: int = 0, *, fail_on_close: bool = False) -> None:
        self.events: list[Event] = []
        self.fail_on = fail_on
        self.fail_on_close = fail_on_close
        self.closed = False

    def emit(self, event: Event) -> None:
        self.events.append(event)
        if len(self.events) == self.fail_on:
            raise ConnectionError("the tracking server is away")

    def close(self) -> None:
        self.closed = True
        if self.fail_on_close:
            raise OSError("cannot flush")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def test_events_come_back_as_they_were_emitted(path: Path) -> None:
    log = EventLog(path, clock=lambda: 12.5)
    assert log.emit("start") == {"t": 12.5, "kind": "start"}
    log.emit("step", slot="a", step=1, loss=1.25, done=False, text='"quoted"\nüñ 榫', none=None)
    assert list(log.read()) == [
        {"t": 12.5, "kind": "start"},
        {"t": 12.5, "kind": "step", "slot": "a", "step": 1, "loss": 1.25, "done": False}
        | {"text": '"quoted"\nüñ 榫', "none": None},
    ]
    assert path.read_bytes().count(b"\n") == 2


def test_numbers_that_json_lacks_are_written_as_words(path: Path) -> None:
    EventLog(path).emit("step", loss=float("nan"), high=float("inf"), low=float("-inf"))
    (event,) = read_events(path)
    assert (event["loss"], event["high"], event["low"]) == ("nan", "inf", "-inf")


def test_no_file_means_no_events(path: Path) -> None:
    assert list(read_events(path)) == []
    assert curve(path, "a") == []


def test_p21_a_torn_last_line_is_passed_over_and_written_behind(path: Path) -> None:
    log = EventLog(path)
    log.emit("step", step=1)
    log.close()
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole + whole[:cut])
        again = EventLog(path)
        events = 2 if cut == len(whole) - 1 else 1  # with all but its newline, the event itself is whole
        assert len(list(again.read())) == events
        again.emit("resume", step=1)
        again.close()
        assert [event["kind"] for event in read_events(path)][-1] == "resume"
        assert len(list(read_events(path))) == events + 1


def test_lines_that_are_no_events_are_passed_over(path: Path) -> None:
    path.write_bytes(b'[1]\n{"t": 1}\n\xff\xfe\n\n{"t": 1, "kind": "start"}\n')
    assert [event["kind"] for event in read_events(path)] == ["start"]


def test_p21_the_curve_is_that_of_the_run_that_never_stopped(path: Path) -> None:
    log = EventLog(path)
    for step in range(1, 8):
        log.emit("step", slot="a", step=step, loss=float(step))
        log.emit("step", slot="b", step=step, loss=-1.0)
        log.emit("validation", slot="a", step=step, loss=0.5)
    log.emit("resume", step=4)
    log.emit("step", slot="a", step=5, loss=50.0)
    points = curve(path, "a")
    # Steps 6 and 7 belong to the life that was lost; step 5 counts as it was done last.
    assert [(event["step"], event["loss"]) for event in points] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50)]
    assert [event["loss"] for event in curve(path, "a", kind="validation")] == [0.5] * 4


def test_p21_a_run_that_begins_again_forgets_the_life_before(path: Path) -> None:
    log = EventLog(path)
    for steps in (7, 3):  # killed before its first checkpoint, then begun again
        log.emit("start")
        for step in range(1, steps + 1):
            log.emit("step", slot="a", step=step)
    assert [event["step"] for event in curve(path, "a")] == [1, 2, 3]


def test_a_step_logged_twice_without_a_resume_counts_once(path: Path) -> None:
    log = EventLog(path)
    for loss in (1.0, 2.0):
        log.emit("step", slot="a", step=1, loss=loss)
    assert [event["loss"] for event in curve(path, "a")] == [2.0]


def test_following_sees_every_event_once(path: Path) -> None:
    finished = threading.Event()

    def write() -> None:
        time.sleep(0.05)
        log = EventLog(path)
        for step in range(200):
            log.emit("step", step=step)
        finished.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = [event["step"] for event in follow_events(path, stop=finished.is_set, poll_seconds=0.001)]
    writer.join()
    assert seen == list(range(200))


def test_following_waits_for_the_rest_of_a_line(path: Path) -> None:
    path.write_bytes(b'{"t": 1, "kind": "start"}\n{"t": 2, "ki')
    rounds = iter([False, False, True])
    seen = []

    def stop() -> bool:
        done = next(rounds)
        if done:
            path.write_bytes(path.read_bytes() + b'nd": "finished"}\n')
        return done

    for event in follow_events(path, stop=stop, poll_seconds=0.001):
        seen.append(event["kind"])
    assert seen == ["start", "finished"]


def test_every_sink_gets_every_event(path: Path) -> None:
    sinks = [Recorder(), Recorder()]
    broadcast = Broadcast(EventLog(path), sinks)
    broadcast.emit("start")
    broadcast.emit("step", step=1)
    broadcast.close()
    assert all(sink.events == list(read_events(path)) and sink.closed for sink in sinks)


def test_a_failing_tracker_is_reported_once_and_the_others_go_on(path: Path) -> None:
    bad, good = Recorder(fail_on=2), Recorder()
    broadcast = Broadcast(EventLog(path), [bad, good])
    for step in range(1, 6):
        broadcast.emit("step", step=step)
    broadcast.close()
    assert len(bad.events) == 2
    assert [event["step"] for event in good.events] == [1, 2, 3, 4, 5]
    warnings = [event for event in read_events(path) if event["kind"] == "warning"]
    assert [event["code"] for event in warnings] == ["run-tracker-failed"]
    assert "Recorder failed" in str(warnings[0]["text"])
    assert "ConnectionError: the tracking server is away" in str(warnings[0]["text"])


def test_a_tracker_that_fails_at_the_end_is_reported_too(path: Path) -> None:
    last = Recorder()
    broadcast = Broadcast(EventLog(path), [Recorder(fail_on_close=True), last])
    broadcast.emit("finished")
    broadcast.close()
    assert last.closed
    assert [event["kind"] for event in read_events(path)] == ["finished", "warning"]
