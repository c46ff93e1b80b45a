"""vLLM as whoever makes the sequences: what it is asked, what comes back, adapters in and out, and its death."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tenon.adapters.peft_files import read_adapter
from tenon.errors import StopRequestedError
from tenon.infer.requests import Completion, Token
from tenon.serve.jobs import Ended, Failed
from tenon.serve.vllm.adapters import NOTHING
from tests.serve.house import House, wait_until
from tests.serve.vllm_house import Foreign, foreign

DIES, DIES_LATER, REFUSED = 13, 14, 15  # see the stand-in


@pytest.fixture(scope="module")
def running(house: House, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Foreign]:
    with foreign(house, tmp_path_factory.mktemp("vllm")) as started:
        yield started


def completion(end: Ended | Failed) -> Completion:
    assert isinstance(end, Ended), end
    return end.completion


# ---- what it is asked, and what comes back ----------------------------------------------------------------------


def test_tokens_come_one_by_one_and_the_end_tells_them_all(running: Foreign) -> None:
    _, box = running.ask([40, 50], max_new_tokens=3, top_logprobs=2)
    assert completion(box.end()) == Completion((51, 52, 53), (-0.051, -0.052, -0.053), "length")
    assert box.events[0] == Token(51, -0.051, ((0, 0.0), (1, -0.001)))
    assert [event.id for event in box.events[:-1] if isinstance(event, Token)] == [51, 52, 53]


def test_a_stop_token_ends_the_answer_and_is_no_part_of_it(running: Foreign) -> None:
    _, box = running.ask([50], max_new_tokens=9, stop_ids=frozenset({53, 99}))
    assert completion(box.end()) == Completion((51, 52), (-0.051, -0.052), "stop")
    assert len(box.events) == 3


def test_a_prompt_is_scored_without_its_first_token(running: Foreign) -> None:
    _, box = running.ask([9, 20, 30], max_new_tokens=1, prompt_logprobs=True, top_logprobs=1)
    found = completion(box.end())
    assert found.prompt == (Token(20, -0.02, ((0, 0.0),)), Token(30, -0.03, ((0, 0.0),)))
    assert found.ids == (31,)


def test_everything_that_a_request_says_is_passed_on(running: Foreign) -> None:
    """And nothing of it is left to what the base's own files say."""
    fields = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 2**63 + 4}
    fields |= {"presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.5}
    _, box = running.ask([77], **fields, stop_ids=frozenset({5, 3}), logit_bias=((7, 2.0), (9, -1.5)))
    box.end()
    (body,) = [body for body in running.asked("completions") if body["prompt"] == [77]]
    assert {name: body[name] for name in fields} == {**fields, "seed": 4}
    assert body["logit_bias"] == {"7": 2.0, "9": -1.5}
    assert body["stop_token_ids"] == [3, 5] and body["ignore_eos"] and body["max_tokens"] == 4
    assert "cache_salt" not in body


def test_tenants_have_salts_that_tell_nothing_of_them(running: Foreign) -> None:
    for tenant in ("acme", "acme", "other"):
        running.ask([78], salt=tenant)[1].end()
    salts = [body["cache_salt"] for body in running.asked("completions") if body["prompt"] == [78]]
    assert salts[0] == salts[1] != salts[2]
    assert all(len(salt) == 64 and "acme" not in salt for salt in salts)


def test_what_vllm_refuses_is_the_requests_fault(running: Foreign) -> None:
    _, box = running.ask([REFUSED])
    end = box.end()
    assert isinstance(end, Failed) and end.error.code == "usage-engine" and "not understood" in end.error.got
    _, box = running.ask([50], draft_ids=[51])
    end = box.end()
    assert isinstance(end, Failed) and end.error.code == "usage-engine" and "draft_ids" in end.error.got


def test_a_cancelled_job_is_told_its_end_and_vllm_is_left(running: Foreign) -> None:
    job, box = running.ask([60], max_new_tokens=100_000)
    box.tokens(3)
    running.engines.cancel(job)
    found = completion(box.end())
    assert found.finish == "cancelled" and found.ids[:3] == (61, 62, 63)
    wait_until(lambda: any(line["prompt"] == [60] for line in running.asked("aborted")))
    running.engines.cancel(job)  # harmless
    job, box = running.ask([61])
    running.engines.cancel(job)  # before it began
    assert completion(box.end()).finish in ("cancelled", "length")


def test_what_runs_is_counted(running: Foreign) -> None:
    job, box = running.ask([62], max_new_tokens=100_000)
    box.tokens(1)
    wait_until(lambda: running.engines.load.running == 1 and running.engines.load.cache_used == 0.25)
    load = running.engines.load
    assert (load.waiting, load.parked, load.preemptions, load.prefix_hit_tokens) == (0, 0, 3, 128)
    running.engines.cancel(job)
    box.end()
    running.ask([1])[1].end()
    wait_until(lambda: running.engines.load.running == 0)


# ---- adapters ---------------------------------------------------------------------------------------------------


def test_an_adapter_is_given_once_under_its_hash(house: House, tmp_path: Path) -> None:
    with foreign(house, tmp_path) as running:
        boxes = [running.ask([50], "low")[1] for _ in range(3)]
        assert all(completion(box.end()).ids == (52, 54, 56, 58) for box in boxes)
        assert completion(running.ask([50], "high")[1].end()).ids == (57, 64, 71, 78)
        assert completion(running.ask([50])[1].end()).ids == (51, 52, 53, 54)
        entry = house.registry.get("low")
        given = running.asked("load")
        assert [line["name"] for line in given] == [entry.adapter_hash, house.registry.get("high").adapter_hash]
        assert Path(given[0]["path"]).name == entry.adapter_hash
        assert given[0]["files"] == ["adapter_config.json", "adapter_model.safetensors"]
        mine, theirs = read_adapter(Path(given[0]["path"])), read_adapter(house.registry.folder(entry))
        assert mine.shape == theirs.shape
        for site, pair in theirs.matrices.items():
            assert all((a == b).all() for a, b in zip(pair, mine.matrices[site], strict=True))
        assert running.engines.resident == {line["name"] for line in given} and running.engines.loads == 2
    assert not (tmp_path / "adapters").exists()


def test_where_vllm_mixes_the_base_up_it_is_asked_through_an_adapter_of_zeros(house: House, tmp_path: Path) -> None:
    with foreign(house, tmp_path, base_by_adapter=True, slots=2) as running:
        boxes = [running.ask([50])[1] for _ in range(2)] + [running.ask([50], "low")[1], running.ask([50], "high")[1]]
        assert [completion(box.end()).ids[0] for box in boxes] == [51, 51, 52, 57]
        zeros, *others = running.asked("load")
        assert zeros["name"] == NOTHING and len(others) == 2
        warm_up, *asked = running.asked("completions")
        assert warm_up["model"] == "base" and all(body["model"] != "base" for body in asked)
        matrices = read_adapter(Path(zeros["path"])).matrices
        assert len(matrices) == 1 and not any(matrix.any() for pair in matrices.values() for matrix in pair)
        assert NOTHING not in running.engines.resident and running.engines.loads == 2
        os.kill(running.process.pid, signal.SIGKILL)
        wait_until(lambda: "vLLM runs again" in running.told, seconds=20)
        assert completion(running.ask([50])[1].end()).ids[0] == 51


def test_what_would_end_this_vllm_is_not_asked_of_it(house: House, tmp_path: Path) -> None:
    with foreign(house, tmp_path, without=("prompt_logprobs",)) as running:
        end = running.ask([50, 60], prompt_logprobs=True)[1].end()
        assert isinstance(end, Failed) and end.error.code == "usage-engine" and "prompt_logprobs" in end.error.got
        assert completion(running.ask([50])[1].end()).ids[0] == 51


def test_the_longest_idle_one_makes_room(house: House, tmp_path: Path) -> None:
    with foreign(house, tmp_path, slots=1) as running:
        for name in ("low", "high", "high", "low"):
            completion(running.ask([50], name)[1].end())
        low, high = (house.registry.get(name).adapter_hash for name in ("low", "high"))
        assert [line["name"] for line in running.asked("load")] == [low, high, low]
        assert [line["name"] for line in running.asked("unload")] == [low, high]
        assert [place.name for place in (tmp_path / "adapters").iterdir()] == [low]
        assert running.engines.resident == {low}


def test_what_is_to_leave_goes_once_nobody_needs_it(house: House, tmp_path: Path) -> None:
    with foreign(house, tmp_path) as running:
        completion(running.ask([50], "low")[1].end())
        low = house.registry.get("low").adapter_hash
        running.engines.unload("nobody")
        running.engines.unload(low)
        wait_until(lambda: bool(running.asked("unload")))
        assert [line["name"] for line in running.asked("unload")] == [low] and not running.engines.resident
        assert completion(running.ask([50], "low")[1].end()).ids[0] == 52 and running.engines.resident == {low}


def test_an_adapter_that_is_asked_for_without_a_pause_gives_way(house: House, tmp_path: Path) -> None:
    """Whoever waits gets in: what runs finishes, and newcomers do not go before them."""
    with foreign(house, tmp_path, slots=1, FAKE_VLLM_SECONDS="0.02") as running:
        boxes = [running.ask([50], "low", max_new_tokens=10)[1]]
        boxes[0].tokens(1)
        _, waiting = running.ask([50], "high")
        began = time.monotonic()
        while not waiting.events:
            boxes.append(running.ask([50], "low", max_new_tokens=10)[1])
            time.sleep(0.05)
            assert time.monotonic() - began < 10
        assert completion(waiting.end()).ids == (57, 64, 71, 78)
        assert all(completion(box.end()).finish == "length" for box in boxes)


def test_refused_adapters_fail_alone(house: House, tmp_path: Path) -> None:
    house.register("disliked", rank=REFUSED, seed=3)
    house.register("large", rank=17, seed=4)
    with foreign(house, tmp_path, max_rank=16) as running:
        _, good = running.ask([50], "low", max_new_tokens=2000)
        good.tokens(1)
        for name, code in (("disliked", "adapter-engine"), ("large", "adapter-rank"), ("disliked", "adapter-engine")):
            end = running.ask([50], name)[1].end()
            assert isinstance(end, Failed) and end.error.code == code, end
        assert completion(good.end()).finish == "length"
        assert completion(running.ask([50], "high")[1].end()).ids[0] == 57


def test_an_adapter_that_is_damaged_on_disk_is_not_given(house: House, tmp_path: Path) -> None:
    entry = house.register("torn", rank=2, seed=5)
    path = house.registry.folder(entry) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with foreign(house, tmp_path) as running:
        end = running.ask([50], "torn")[1].end()
        assert isinstance(end, Failed) and end.error.code == "adapter-damaged"
        assert running.asked("start") and not running.asked("load")


# ---- death ------------------------------------------------------------------------------------------------------


def test_what_had_said_nothing_is_made_anew_when_vllm_dies(house: House, tmp_path: Path) -> None:
    with foreign(house, tmp_path, FAKE_VLLM_SECONDS="0.05") as running:
        _, begun = running.ask([70], "low", max_new_tokens=1000)
        begun.tokens(2)
        _, killer = running.ask([DIES])
        wait_until(lambda: bool(running.told))
        running.have_mercy()
        assert completion(killer.end()).ids == (14, 15, 16, 17)
        end = begun.end()
        assert isinstance(end, Failed) and end.error.code == "run-engine-died"
        assert completion(running.ask([50], "low")[1].end()).ids[0] == 52
        assert len(running.starts) == 2 and running.starts[0].status == 3
        assert "exit status 3" in running.told[0] and running.told[-1] == "vLLM runs again"
        assert len(running.asked("load")) == 2


def test_a_request_that_kills_it_every_time_is_given_up(house: House, tmp_path: Path) -> None:
    with foreign(house, tmp_path) as running:
        _, killer = running.ask([DIES])
        end = killer.end()
        assert isinstance(end, Failed) and end.error.code == "run-engine-died"
        assert len(running.asked("start")) >= 3
        running.have_mercy()
        assert completion(running.ask([50])[1].end()).ids[0] == 51


def test_death_in_an_answer_ends_the_answer(house: House, tmp_path: Path) -> None:
    with foreign(house, tmp_path) as running:
        _, box = running.ask([DIES_LATER, 20], max_new_tokens=9)
        end = box.end()
        assert isinstance(end, Failed) and end.error.code == "run-engine-died"
        assert [event.id for event in box.events[:-1] if isinstance(event, Token)] == [21, 22]


def test_a_killed_process_is_started_again(house: House, tmp_path: Path) -> None:
    with foreign(house, tmp_path) as running:
        completion(running.ask([50])[1].end())
        os.kill(running.process.pid, signal.SIGKILL)
        wait_until(lambda: "vLLM runs again" in running.told, seconds=20)
        assert "signal 9" in running.told[0]
        assert completion(running.ask([50])[1].end()).ids[0] == 51


def test_stopping_ends_the_process_and_tells_every_job(house: House, tmp_path: Path) -> None:
    with foreign(house, tmp_path) as running:
        _, box = running.ask([60], max_new_tokens=100_000)
        box.tokens(1)
        pid = running.process.pid
    end = box.end()
    assert isinstance(end, Failed) and isinstance(end.error, StopRequestedError)
    assert not psutil.pid_exists(pid)
