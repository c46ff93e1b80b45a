"""The fastest way that fits: which layers keep what, and how many tokens are computed at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenon.bases.facts import ModelFacts
from tenon.errors import PlanError
from tenon.plan.activations import Activations, Pass
from tenon.plan.combine import combine
from tenon.plan.fit import load_of
from tenon.plan.keeping import (
    Chosen,
    Room,
    Steps,
    choose_keeping,
    describe,
    describe_use,
    keep_same,
    may_keep,
    peak_bytes,
    tighten,
)
from tenon.plan.precision import DENSE
from tenon.plan.size import DataSize
from tenon.plan.values import LEVELS, Frozen, Keeping

from .situations import CPU, GB, H100, LLAMA_1B, LLAMA_8B, SMOLLM2_135M, plan_of
from .test_activations import NF4_IN_FP8, all_modules, resident_bytes

HOST_BYTES = 100 * GB
LONG = DataSize(rows=1000, mean_tokens=900.0, longest_tokens=2000, exact=True)


def steps_of(
    facts: ModelFacts = LLAMA_8B, frozen: Frozen = DENSE, *, rows: int = 4, row_tokens: int = 2048, on: str = "cuda"
) -> Steps:
    machine = H100 if on == "cuda" else CPU
    return Steps(
        of=Pass(facts, all_modules(facts, 16), on, "bf16" if on == "cuda" else "fp32", frozen),
        machine=machine,
        longest_tokens=row_tokens,
        step_tokens=rows * row_tokens,
        row_tokens=row_tokens,
        token_flops=4.5 * facts.parameters,
        levels=may_keep("auto", on),
    )


def within(gigabytes: float, steps: Steps, host_bytes: float = HOST_BYTES) -> Chosen:
    """What is chosen where base, adapter and steps together may take so much."""
    resident = resident_bytes(steps.of.facts, steps.of.frozen, 16)
    return choose_keeping(steps, Room(gigabytes * GB - resident, host_bytes))


def test_everything_is_kept_where_it_fits() -> None:
    found = within(50, steps_of())
    assert found.fits and found.keeping == Keeping(micro_tokens=8192, all_layers=32)
    # 2 x 8,192 tokens of an 8B base in bf16 within 80 GB, at once.
    long = within(80, steps_of(rows=2, row_tokens=8192))
    assert long.fits and (long.keeping.counts, long.keeping.micro_tokens) == ((32, 0, 0, 0), 16_384)


def test_nf4_within_8_point_6_gb() -> None:
    """QLoRA of an 8B base, 8,192 tokens a step, all at once: layers' inputs wait in the host's memory."""
    found = within(8.6, steps_of(frozen=NF4_IN_FP8))
    assert found.fits and found.keeping.micro_tokens == 8192
    assert found.keeping.all_layers == 0 and found.keeping.host_layers > 8
    # Without room in the host there are fewer tokens at once instead.
    no_host = within(8.6, steps_of(frozen=NF4_IN_FP8), host_bytes=0.0)
    assert no_host.fits and no_host.keeping.host_layers == 0 and no_host.keeping.micro_tokens < 8192
    assert no_host.seconds > found.seconds


def test_less_memory_takes_more_time() -> None:
    steps = steps_of(LLAMA_1B)
    found = [within(gigabytes, steps) for gigabytes in (12, 8, 6, 5, 4.5, 4, 3.6)]
    assert all(one.fits for one in found)
    seconds, peaks = [one.seconds for one in found], [one.peak_bytes for one in found]
    assert seconds == sorted(seconds) and peaks == sorted(peaks, reverse=True)
    assert found[0].keeping.counts == (16, 0, 0, 0)


def test_what_is_left_when_nothing_fits_is_the_smallest() -> None:
    steps = steps_of()
    found = within(16.2, steps)
    assert not found.fits and found.keeping.all_layers == 0
    just = choose_keeping(steps, Room(found.peak_bytes, HOST_BYTES))
    assert just.fits and just.peak_bytes == found.peak_bytes


def test_tokens_that_were_asked_stay() -> None:
    steps = replace(steps_of(), micro_tokens=4096)
    for gigabytes in (60, 24, 20):
        found = within(gigabytes, steps)
        assert found.fits and found.keeping.micro_tokens == 4096
    assert within(24, steps).keeping.all_layers < 32


@pytest.mark.parametrize(("checkpointing", "counts"), [("none", (32, 0, 0, 0)), ("full", (0, 0, 32, 0))])
def test_checkpointing_that_was_asked_stays(checkpointing: str, counts: tuple[int, ...]) -> None:
    steps = replace(steps_of(), levels=may_keep(checkpointing, "cuda"))
    assert within(80, steps).keeping.counts == within(24, steps).keeping.counts == counts


def test_a_cpu_puts_nothing_into_a_host() -> None:
    assert may_keep("auto", "cpu") == ("all", "most", "input")
    steps = steps_of(SMOLLM2_135M, rows=8, row_tokens=1024, on="cpu")
    room = Room(0.4 * GB, 0.0)
    assert choose_keeping(steps, room).fits and choose_keeping(steps, room).keeping.host_layers == 0


def test_a_batch_is_no_larger_than_a_step() -> None:
    """Steps of 1,024 tokens need no room for 16,384, only for one half as long again."""
    steps = steps_of(LLAMA_1B, rows=16, row_tokens=64)
    assert steps.at_once(16_384) == 1536
    assert within(5, steps).keeping.counts == (16, 0, 0, 0)


@settings(max_examples=60, deadline=None)
@given(
    gigabytes=st.floats(0.05, 60),
    facts=st.sampled_from([LLAMA_8B, LLAMA_1B, SMOLLM2_135M]),
    frozen=st.sampled_from([DENSE, NF4_IN_FP8]),
    row_tokens=st.sampled_from([64, 500, 2048]),
)
def test_what_is_said_to_fit_fits(gigabytes: float, facts: ModelFacts, frozen: Frozen, row_tokens: int) -> None:
    steps = steps_of(facts, frozen, row_tokens=row_tokens)
    room = Room(gigabytes * GB, HOST_BYTES)
    found = choose_keeping(steps, room)
    assert found.peak_bytes == peak_bytes(steps, found.keeping)
    assert sum(found.keeping.counts) == facts.layers
    assert found.fits == (found.peak_bytes <= room.device_bytes)
    assert row_tokens <= found.keeping.micro_tokens <= 16_384


# --- when memory ran out


def test_layers_are_thinned_before_tokens_are_halved() -> None:
    """The order of decisions, from everything kept to nothing left."""
    steps, room = steps_of(), Room(1000 * GB, HOST_BYTES)
    way, seen = keep_same(steps, 8192, room), list[Chosen]()
    while way is not None:
        assert not seen or way.peak_bytes <= 0.95 * seen[-1].peak_bytes or way.keeping.all_layers == 0
        assert not seen or way.peak_bytes < seen[-1].peak_bytes
        seen.append(way)
        way = tighten(steps, way.keeping, room)
    tokens = [one.keeping.micro_tokens for one in seen]
    assert tokens == sorted(tokens, reverse=True) and set(tokens) == {8192, 4096, 2048}
    last = max(at for at, count in enumerate(tokens) if count == 8192)
    assert seen[last].keeping.all_layers == 0 and last > 5
    assert seen[-1].keeping.all_layers == 0


def test_one_decision_is_enough_when_a_neighbour_takes_half() -> None:
    steps = steps_of()
    now = keep_same(steps, 8192, Room(30 * GB, HOST_BYTES))
    found = tighten(steps, now.keeping, Room(12 * GB, HOST_BYTES))
    assert found is not None and found.fits
    assert found.peak_bytes <= 12 * GB and found.keeping.micro_tokens == 8192
    small = tighten(steps, now.keeping, Room(0.6 * GB, HOST_BYTES))
    assert small is not None and small.peak_bytes <= 0.6 * GB and small.keeping.micro_tokens < 8192
    assert tighten(steps, now.keeping, Room(0.05 * GB, HOST_BYTES)) is None


def test_where_everything_must_be_kept_only_tokens_are_left() -> None:
    steps = replace(steps_of(), levels=("all",))
    found = tighten(steps, Keeping(micro_tokens=8192, all_layers=32), Room(1000 * GB, HOST_BYTES))
    assert found is not None and found.keeping == Keeping(micro_tokens=4096, all_layers=32)
    assert tighten(steps, Keeping(micro_tokens=2048, all_layers=32), Room(1000 * GB, HOST_BYTES)) is None


# --- words, and what the decoder is told


def test_a_decision_in_words() -> None:
    assert describe(Keeping(micro_tokens=8, all_layers=20, most_layers=12)) == (
        "keeps everything of 20 layers, gate and up of 12 layers are computed again"
    )
    assert describe(Keeping(micro_tokens=8, all_layers=0, input_layers=1, host_layers=31)) == (
        "1 layer computed again, 31 layers computed again from inputs in the host's memory"
    )
    whole = Keeping(micro_tokens=8192, all_layers=32)
    assert describe_use(whole, 41.2e9, 72e9) == (
        "keeps everything, computes nothing twice; 8,192 tokens at once; about 41.2 GB of 72.0 GB"
    )


def test_layers_that_keep_least_lie_lowest() -> None:
    keeping = Keeping(micro_tokens=1, all_layers=1, most_layers=2, input_layers=1, host_layers=2)
    assert keeping.levels(6) == ("host", "host", "input", "most", "most", "all")
    # Two layers below the lowest adapted one.
    assert keeping.levels(8)[:3] == ("all", "all", "host")
    assert Keeping.from_json(keeping.to_json()) == keeping


def test_the_first_layers_to_be_thinned_are_the_cheapest() -> None:
    steps = replace(steps_of(), micro_tokens=8192)
    activations = Activations(steps.of, 8192)
    found = within(40, steps)
    assert found.keeping.counts[0] < 32
    spared = activations.peak_bytes((32, 0, 0, 0)) - found.peak_bytes
    per_layer = activations.kept["all"] - activations.kept["input"]
    # No more layers than it takes.
    assert 32 - found.keeping.all_layers <= spared / per_layer + 1
    assert all(level in LEVELS for level in found.keeping.levels(32))


def test_a_plan_says_enough_to_decide_again() -> None:
    """What is built of a plan when base and slots are loaded chooses what the planner chose, given the same room."""
    plan = plan_of("memory=22 GB", "batch.rows=8", facts=LLAMA_8B, machine=H100, size=LONG)
    load = load_of(plan, longest_tokens=2000, step_tokens=8 * 900.0)
    (frozen,) = load.formats
    assert (load.limit_bytes, load.levels, load.shards, frozen) == (22 * GB, LEVELS, (1,), plan.frozen)
    assert choose_keeping(load.steps(frozen), load.room(frozen, 1)).keeping == plan.keeping
    assert load.resident(frozen, 1)[0].what == "base"


def test_two_plans_share_one_decision() -> None:
    plans = [
        plan_of(*asked, facts=LLAMA_8B, machine=H100, size=LONG, file=f"{name}.yaml")
        for name, *asked in (("a", "memory=60 GB"), ("b", "checkpointing=none", "lora.rank=64"))
    ]
    both = combine(plans)
    assert both.memory_limit_bytes == 60 * GB and both.may_keep == ("all",)
    assert both.keeping.counts == (32, 0, 0, 0) and both.estimate.memory_bytes <= 61.2 * GB
    with pytest.raises(PlanError, match="their checkpointing differs"):
        full = plan_of("checkpointing=full", facts=LLAMA_8B, machine=H100, size=LONG, file="c.yaml")
        combine([plans[1], full])
