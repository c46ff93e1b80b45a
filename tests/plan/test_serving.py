"""What a server will hold, what keys and values get, and what is said where it is too much."""

from __future__ import annotations

import pytest

from tenon.bases.facts import MODULE_PATHS
from tenon.errors import PlanError
from tenon.plan.fit import usable_bytes
from tenon.plan.precision import resident_format
from tenon.plan.requests import Engine, Replicas, Seat
from tenon.plan.serving import (
    CACHE_BYTES,
    Room,
    describe_memory,
    plan_cache,
    plan_context,
    plan_server,
    server_terms,
    token_bytes,
)
from tenon.plan.values import Frozen, MachineFacts
from tests.plan.situations import CPU, GB, H100, LLAMA_8B, base_of

ROOM = Room(slots=8, rows=16, context_tokens=4096)
ON_H100 = Engine(base=base_of(LLAMA_8B), machine=H100, precision="bf16")


def with_memory(gigabytes: float) -> MachineFacts:
    return H100.model_copy(update={"device_memory_bytes": round(gigabytes * GB)})


def test_an_8b_base_on_a_large_gpu_is_its_weights_its_shelf_and_little_more() -> None:
    base, adapters, passes, process = (term.size_bytes for term in server_terms(ON_H100, H100, ROOM))
    shelf = sum(LLAMA_8B.linear_shape(module)[1] for module in MODULE_PATHS) * 32 * 8 * 16 * 2
    assert base == LLAMA_8B.parameters * 2 + shelf
    # Rank 16 on all seven: 41.9 million parameters, in fp32 and again in bf16.
    assert adapters == 8 * 41_943_040 * 6
    assert 0.1 * GB < passes < GB < process < 2 * GB
    assert token_bytes(ON_H100) == 2 * 32 * 8 * 128 * 2
    assert plan_cache(ON_H100, [H100], ROOM, None) == CACHE_BYTES
    assert plan_cache(ON_H100, [H100], ROOM, 40 * GB) == 40 * GB
    words = describe_memory(ON_H100, H100, ROOM, 2 * GB)
    assert words.startswith("about ") and "base in bf16 16.4 GB" in words and "cache 2.0 GB" in words


def test_the_cache_takes_what_is_left_and_no_less_than_one_sequence() -> None:
    need = sum(term.size_bytes for term in server_terms(ON_H100, H100, ROOM))
    one = (4096 + 64) * token_bytes(ON_H100)
    tight = with_memory((need + one + GB) / 0.9 / GB)
    left = plan_cache(ON_H100, [tight, H100], ROOM, None)
    assert abs(left - one - GB) < 1000 and need + left <= usable_bytes(tight), "the smallest machine counts"
    with pytest.raises(PlanError, match="may be used") as error:
        plan_cache(ON_H100, [tight], ROOM, 3 * GB)
    assert error.value.code == "plan-memory" and error.value.hint == f"what would fit: --cache {left // 10**6}MB"
    with pytest.raises(PlanError) as error:
        plan_cache(ON_H100, [with_memory((need + one / 2) / 0.9 / GB)], ROOM, None)
    assert error.value.hint == "what would fit: --base-precision int8 or --base-precision nf4 or --slots 1"
    with pytest.raises(PlanError) as error:
        plan_cache(ON_H100, [with_memory(4)], ROOM, None)
    assert "a smaller base" in error.value.hint


def test_what_is_said_to_fit_fits() -> None:
    small = with_memory(16)
    with pytest.raises(PlanError) as error:
        plan_cache(ON_H100, [small], ROOM, None)
    assert "--base-precision nf4" in error.value.hint
    changed = ON_H100.model_copy(update={"frozen": Frozen(format="nf4")})
    assert plan_cache(changed, [small], ROOM, None) == CACHE_BYTES


def test_a_cache_that_holds_no_sequence_is_refused_for_either_engine() -> None:
    for by_vllm, block in ((False, 64), (True, 128)):
        one = (1024 + block) * token_bytes(ON_H100)
        asked = {"slots": 8, "rows": 16, "context_tokens": 1024, "by_vllm": by_vllm}
        assert plan_server(ON_H100, cache_bytes=one, **asked).cache_bytes == one
        with pytest.raises(PlanError, match="does not hold one sequence of 1,024 tokens") as error:
            plan_server(ON_H100, cache_bytes=one - 1, **asked)
        assert error.value.code == "plan-cache" and "--context" in error.value.hint


def test_a_server_s_plan_is_that_of_its_smallest_engine() -> None:
    small = with_memory(24)
    seats = (Seat(machine=H100), Seat(machine=small))
    alone = plan_server(ON_H100, slots=8, rows=16)
    several = plan_server(ON_H100, slots=8, rows=16, replicas=Replicas(seats=seats))
    assert alone.cache_bytes == CACHE_BYTES and alone.context_tokens == ROOM.context_tokens
    assert several.cache_bytes == plan_cache(ON_H100, [small], ROOM, None) < CACHE_BYTES
    assert several.memory == describe_memory(ON_H100, small, ROOM, several.cache_bytes)
    assert plan_server(ON_H100, slots=8, rows=16, by_vllm=True).memory is None, "vLLM counts its own"


def test_slots_cost_what_they_hold() -> None:
    with pytest.raises(PlanError) as error:
        plan_cache(ON_H100, [H100], Room(slots=1024, rows=16, context_tokens=4096), None)
    assert "--slots 1" in error.value.hint and "1024 adapters" in error.value.got


def test_a_small_base_fits_on_a_laptop() -> None:
    engine = Engine(base=base_of(), machine=CPU)
    laptop = CPU.model_copy(update={"host_memory_bytes": 4 * GB})
    assert 0 < plan_cache(engine, [laptop], ROOM, None) <= CACHE_BYTES


def test_the_context_is_the_base_s_at_most() -> None:
    engine = Engine(base=base_of(), machine=CPU)
    assert plan_context(engine, None) == 4096 and plan_context(engine, 8192) == 8192
    short = base_of(base_of().facts.model_copy(update={"context_tokens": 512}))
    assert plan_context(Engine(base=short, machine=CPU), None) == 512
    with pytest.raises(PlanError, match="at most 8,192") as error:
        plan_context(engine, 8193)
    assert error.value.code == "plan-context" and "--context 8192" in error.value.hint


def test_what_the_base_is_kept_in_may_be_said() -> None:
    old = H100.model_copy(update={"capability": (8, 0)})
    asked = {
        word: resident_format(LLAMA_8B, H100, "bf16", word).format for word in ("auto", "same", "fp8", "int8", "nf4")
    }
    assert asked == {"auto": "dense", "same": "dense", "fp8": "fp8", "int8": "int8", "nf4": "nf4"}
    assert resident_format(LLAMA_8B, CPU, "fp32", "nf4") == Frozen(format="nf4")
    with pytest.raises(PlanError, match=r"8\.9 or later") as error:
        resident_format(LLAMA_8B, old, "bf16", "fp8")
    assert error.value.code == "plan-precision" and "--base-precision int8" in error.value.hint
