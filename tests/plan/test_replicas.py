"""How many engines a server has, and which GPU or which threads each gets."""

from __future__ import annotations

import pytest

from tenon.errors import PlanError, UsageError
from tenon.plan.replicas import plan_replicas
from tenon.plan.requests import Engine, Replicas
from tenon.plan.values import MachineFacts
from tests.plan.situations import CPU, GB, H100, base_of

FOUR = H100.model_copy(update={"device_count": 4, "peers_memory_bytes": (80 * GB, 79 * GB, 40 * GB)})


def plan(text: str, machine: MachineFacts, *, visible: str | None = None) -> Replicas | None:
    return plan_replicas(
        text,
        Engine(base=base_of(), machine=machine),
        visible_devices=visible,
        queue_delay_seconds=0.5,
        silence_seconds=9.0,
    )


def test_one_is_in_the_server_s_own_process() -> None:
    assert plan("1", CPU) is None and plan("auto", CPU) is None and plan("0", H100) is None


def test_engines_on_a_cpu_share_its_threads() -> None:
    found = plan("2", CPU.model_copy(update={"threads": 7}))
    assert found is not None and (found.least, len(found.seats)) == (2, 2)
    assert [seat.machine.threads for seat in found.seats] == [3, 3]
    assert {seat.visible_devices for seat in found.seats} == {None}
    assert (found.up_delay_seconds, found.silence_seconds) == (0.5, 9.0)


def test_each_engine_has_a_gpu_of_its_own() -> None:
    found = plan("1-4", FOUR)
    assert found is not None and found.least == 1
    assert [seat.visible_devices for seat in found.seats] == ["0", "1", "2", "3"]
    assert [seat.machine.device_memory_bytes for seat in found.seats] == [80 * GB, 80 * GB, 79 * GB, 40 * GB]
    assert all(seat.machine.device_count == 1 and not seat.machine.peers_memory_bytes for seat in found.seats)
    named = plan("2", FOUR, visible="GPU-b, GPU-a,3,1")
    assert named is not None and [seat.visible_devices for seat in named.seats] == ["GPU-b", "GPU-a"]


def test_auto_takes_the_gpus_that_nobody_uses() -> None:
    found = plan("auto", FOUR)
    assert found is not None and (found.least, len(found.seats)) == (3, 3), "the fourth is in use"
    assert plan("0", FOUR) == found


@pytest.mark.parametrize("text", ["", "two", "-1", "3-2", "0-2", "1-", "1.5", "99999"])
def test_what_is_no_number_of_replicas(text: str) -> None:
    with pytest.raises(UsageError) as error:
        plan(text, CPU)
    assert error.value.code == "usage-replicas" and "--replicas 1-4" in error.value.hint


def test_more_than_there_is_room_for_is_refused_with_what_to_type() -> None:
    with pytest.raises(PlanError, match="this machine has 4") as error:
        plan("5", FOUR)
    assert error.value.code == "plan-replicas" and "--replicas 4" in error.value.hint
    with pytest.raises(PlanError, match="a thread each"):
        plan("1-3", CPU)
