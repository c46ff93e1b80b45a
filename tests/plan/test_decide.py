"""Every open question of a recipe gets a definite answer with its reason, or the run is refused before it starts."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenon.errors import PlanError, RecipeError
from tenon.plan.decide import decide
from tenon.plan.keeping import computed_twice
from tenon.plan.memory import adapter_parameters
from tenon.plan.size import DataSize, count_steps
from tenon.plan.time import flops_per_token
from tenon.plan.values import BatchPlan, Keeping, LimitsPlan, MachineFacts, Plan
from tenon.recipe.defaults import DEFAULTS, DERIVED
from tenon.recipe.fields import leaf_fields

from .situations import CPU, GB, H100, LLAMA_8B, SIZE, SMALL, SMOLLM2_135M, T4, base_of, choice, load, plan_of


def refused(*overrides: str, machine: MachineFacts = CPU, **rest: object) -> PlanError:
    with pytest.raises(PlanError) as caught:
        plan_of(*overrides, machine=machine, **rest)  # pyright: ignore[reportArgumentType]
    return caught.value


def test_defaults_follow_the_evidence() -> None:
    slot = plan_of().slots[0]
    assert (slot.name, slot.register_as) == ("my", "my")
    assert (slot.lora.rank, slot.lora.alpha, slot.lora.scale) == (16, 32.0, 2.0)
    assert len(slot.lora.sites) == 210
    assert (slot.optimizer.kind, slot.optimizer.lr, slot.optimizer.weight_decay) == ("adamw", 1e-3, 0.0)
    assert (slot.optimizer.beta1, slot.optimizer.beta2, slot.optimizer.clip_norm) == (0.9, 0.999, 1.0)
    assert (slot.schedule.kind, slot.schedule.warmup, slot.schedule.floor) == ("cosine", 0.05, 0.0)
    assert (slot.batch.rows, slot.batch.tokens, slot.limits.epochs) == (16, 0, 3.0)
    assert (slot.data.max_tokens, slot.data.on_long, slot.data.supervise) == (2048, "stop", "assistant")
    assert (slot.data.heldout, slot.data.heldout_by) == (0.05, "fraction")


@pytest.mark.parametrize(("facts", "rate"), [(SMOLLM2_135M, 1e-3), (LLAMA_8B, 2e-4)])
def test_small_bases_take_a_higher_rate(facts: object, rate: float) -> None:
    assert plan_of(facts=facts, machine=H100).slots[0].optimizer.lr == rate  # pyright: ignore[reportArgumentType]


def test_alpha_keeps_its_ratio_to_the_rank() -> None:
    assert plan_of("lora.rank=64").slots[0].lora.alpha == 128.0
    lora = plan_of("lora.rank=64", "lora.rslora=true").slots[0].lora
    assert lora.scale == pytest.approx(lora.alpha / 8.0)
    assert plan_of("lora.rank=16", "lora.rslora=true").slots[0].lora.scale == pytest.approx(2.0)


def test_every_field_of_the_recipe_has_a_choice_with_origin_and_reason() -> None:
    for overrides in (
        (),
        ("optimizer.kind=sgd", "batch.tokens=900", "schedule.kind=wsd"),
        ("data.validation=v.jsonl",),
    ):
        plan = plan_of(*overrides)
        keys = [one.key for one in plan.choices]
        assert {leaf.key for leaf in leaf_fields()} <= set(keys)
        assert len(keys) == len(set(keys))
        assert all(one.reason for one in plan.choices)


def test_the_documented_defaults_are_those_that_are_used() -> None:
    optional = {leaf.key for leaf in leaf_fields() if not leaf.required}
    assert set(DEFAULTS) | set(DERIVED) == optional
    assert not set(DEFAULTS) & set(DERIVED)
    origins = {one.key: one.origin for one in plan_of().choices}
    assert all(origins[key] == "default" for key in DEFAULTS)
    assert all(origins[key] == "derived" for key in DERIVED)


def test_nothing_in_a_plan_is_left_open() -> None:
    plan = plan_of()
    assert '"auto"' not in plan.model_dump_json(exclude={"choices": True, "slots": {0: {"data": {"train"}}}})


def test_what_was_said_is_what_is_planned() -> None:
    plan = plan_of("lora.rank=8", "optimizer.lr=5e-5", "limits.epochs=1", "data.max_tokens=256", "seed=7")
    slot = plan.slots[0]
    assert (slot.lora.rank, slot.optimizer.lr, slot.limits.epochs) == (8, 5e-5, 1.0)
    assert (slot.data.max_tokens, slot.seed, slot.data.seed) == (256, 7, 7)
    assert choice(plan, "lora.rank").origin == "command line"


def test_aliases_are_named_in_the_plan() -> None:
    found = choice(plan_of(text=SMALL + "lora_r: 8\n"), "lora.rank")
    assert (found.value, found.origin, found.reason) == ("8", "alias", "my.yaml:3, as lora_r")


def test_paths_are_absolute_in_the_plan() -> None:
    plan = plan_of("lora.start_from=old", "data.template=chat.jinja", "evaluate.data=test.jsonl")
    slot = plan.slots[0]
    assert slot.data.train[0].path == "/recipes/rows.jsonl"
    assert slot.data.template == "/recipes/chat.jinja"
    assert slot.lora.start_from == "/recipes/old"
    assert slot.evaluation.sources[0].path == "/recipes/test.jsonl"
    assert plan.run_folder == "/work/runs/my"
    assert plan_of("run=out").run_folder == "/recipes/out"


def test_the_plan_is_pure_and_survives_a_round_trip() -> None:
    assert plan_of() == plan_of()
    plan = plan_of(text=SMALL + "schedule: {kind: wsd}\nlora: {dropout: 0.1}\n", machine=H100)
    assert Plan.from_json(plan.to_json()) == plan


@settings(max_examples=40, deadline=None)
@given(
    rank=st.integers(1, 192),
    rows=st.integers(1, 64),
    epochs=st.floats(0.1, 10),
    kind=st.sampled_from(["cosine", "cosine_restarts", "linear", "constant", "wsd"]),
    size=st.builds(DataSize, rows=st.integers(2, 10**6), mean_tokens=st.floats(1, 3000), exact=st.booleans()),
)
def test_any_sensible_recipe_is_planned(rank: int, rows: int, epochs: float, kind: str, size: DataSize) -> None:
    plan = plan_of(
        f"lora.rank={rank}", f"batch.rows={rows}", f"limits.epochs={epochs!r}", f"schedule.kind={kind}", size=size
    )
    slot, estimate = plan.slots[0], plan.estimate
    assert Plan.from_json(plan.to_json()) == plan
    assert estimate.steps == max(1, math.ceil(max(1, round(epochs * estimate.train_rows)) / rows))
    assert 0 < estimate.train_rows <= size.rows
    assert estimate.memory_bytes < CPU.host_memory_bytes
    assert 0 <= slot.schedule.warmup + slot.schedule.decay <= 1
    assert plan.keeping.micro_tokens >= slot.data.max_tokens


# --- device and precision


@pytest.mark.parametrize(("machine", "precision"), [(CPU, "fp32"), (H100, "bf16"), (T4, "fp16")])
def test_precision_follows_the_device(machine: MachineFacts, precision: str) -> None:
    assert plan_of(machine=machine).precision == precision
    assert plan_of("precision=auto", machine=machine).precision == precision


def test_bf16_on_a_cpu_is_allowed_and_said_to_be_slow() -> None:
    plan = plan_of("precision=bf16")
    assert plan.precision == "bf16"
    assert "slower" in choice(plan, "precision.compute").reason


def test_a_gpu_may_be_left_alone() -> None:
    plan = plan_of("device=cpu", machine=H100)
    assert (plan.machine.device, plan.precision) == ("cpu", "fp32")
    assert plan.machine.device_memory_bytes == H100.host_memory_bytes
    assert "H100" in plan.rejected[0].what


@pytest.mark.parametrize(
    ("overrides", "machine", "code"),
    [
        (("device=cuda",), CPU, "plan-no-gpu"),
        (("precision=fp16",), CPU, "plan-precision"),
        (("precision=fp16", "device=cpu"), H100, "plan-precision"),
        (("precision=bf16",), T4, "plan-precision"),
        (("optimizer.kind=adamw8bit",), CPU, "plan-optimizer"),
        (("optimizer.kind=adamw8bit", "device=cpu"), H100, "plan-optimizer"),
        (("data.max_tokens=8193",), CPU, "plan-context"),
        (("batch.micro_tokens=64",), CPU, "plan-micro-tokens"),
        (("lora.rank=193",), CPU, "plan-rank-too-large"),
        (("lora.targets=q_prj",), CPU, "plan-target-unmatched"),
        (("lora.layers=30-",), CPU, "plan-layer"),
        (("data.heldout=0.9999",), CPU, "plan-no-rows"),
        (("schedule.warmup=5000",), CPU, "plan-schedule"),
        (("schedule.kind=wsd", "schedule.warmup=0.5", "schedule.decay=0.6"), CPU, "plan-schedule"),
    ],
)
def test_what_cannot_run_here_is_refused(overrides: tuple[str, ...], machine: MachineFacts, code: str) -> None:
    error = refused(*overrides, machine=machine)
    assert error.code == code
    assert error.hint


def test_8_bit_adam_on_a_gpu() -> None:
    assert plan_of("optimizer.kind=adamw8bit", machine=H100).slots[0].optimizer.kind == "adamw8bit"


def test_p19_high_ranks_say_what_a_server_needs() -> None:
    plan = plan_of("lora.rank=48")
    assert any("--max-lora-rank 64" in rejection.reason for rejection in plan.rejected)
    assert refused("lora.rank=1000", facts=LLAMA_8B, machine=H100).code == "plan-rank-unservable"


# --- data, batch, limits, schedule


def test_heldout_rows_are_derived_only_where_they_make_sense() -> None:
    assert plan_of().slots[0].data.heldout == 0.05
    assert plan_of(size=SIZE.model_copy(update={"rows": 100_000})).slots[0].data.heldout == 0.005
    assert plan_of(size=SIZE.model_copy(update={"rows": 50})).slots[0].data.heldout == 0.0
    assert plan_of("evaluate.data=test.jsonl").slots[0].data.heldout == 0.0
    assert plan_of("evaluate.data=test.jsonl", "validation.every=5").slots[0].data.heldout == 0.05
    assert plan_of("data.validation=v.jsonl").slots[0].data.heldout == 0.0
    assert plan_of().estimate.train_rows == 950


def test_validation_and_evaluation_need_rows() -> None:
    slot = plan_of("data.heldout=0").slots[0]
    assert (slot.validation.every, slot.evaluation.enabled) == (0, False)
    slot = plan_of().slots[0]
    assert (slot.validation.every, slot.evaluation.enabled, slot.evaluation.metrics) == (18, True, ())
    assert not plan_of("evaluate.metrics=[]").slots[0].evaluation.enabled
    slot = plan_of("evaluate.data=t.jsonl", "evaluate.metrics=[loss, accuracy]").slots[0]
    assert slot.evaluation.metrics == ("loss", "accuracy")


@pytest.mark.parametrize("override", ["validation.metric=acuracy", "evaluate.metrics=[loss, acuracy]"])
def test_unknown_metrics_are_refused_before_anything_is_loaded(override: str) -> None:
    with pytest.raises(RecipeError, match="recipe-metric-unknown") as caught:
        plan_of(override, "evaluate.data=t.jsonl")
    assert override.split("=")[0] in caught.value.what
    assert "accuracy" in caught.value.hint


def test_batches_in_tokens() -> None:
    plan = plan_of("batch.tokens=600")
    assert (plan.slots[0].batch.rows, plan.slots[0].batch.tokens) == (0, 600)
    assert plan.estimate.steps == math.ceil(2850 / 10)
    assert not plan.estimate.exact_steps


def test_limits() -> None:
    assert plan_of("limits.steps=7").slots[0].limits == LimitsPlan(epochs=0.0, steps=7, minutes=0.0)
    assert plan_of("limits.steps=7").estimate.steps == 7
    assert plan_of("limits.steps=7", "limits.epochs=0.01").estimate.steps == 1
    plan = plan_of("limits.minutes=10")
    assert plan.slots[0].limits == LimitsPlan(epochs=0.0, steps=0, minutes=10.0)
    assert plan.estimate.seconds == pytest.approx(600, rel=0.3)
    assert not plan.estimate.exact_steps


@pytest.mark.parametrize(("rows", "batch", "epochs", "steps"), [(10, 4, 1.0, 3), (10, 4, 3.0, 8), (10, 4, 0.5, 2)])
def test_epochs_run_through(rows: int, batch: int, epochs: float, steps: int) -> None:
    limits = LimitsPlan(epochs=epochs, steps=0, minutes=0.0)
    assert count_steps(rows, 5.0, BatchPlan(rows=batch, tokens=0), limits, 1.0) == steps


def test_warmup_in_steps_becomes_a_share() -> None:
    plan = plan_of("schedule.warmup=18", "data.heldout=0")
    assert plan.estimate.steps == 188
    assert plan.slots[0].schedule.warmup == pytest.approx(18 / 188)
    assert "18 of 188 steps" in choice(plan, "schedule.warmup").reason


def test_names_come_from_the_file() -> None:
    assert plan_of(file="My recipe (2).yaml").slots[0].name == "My-recipe--2"
    assert plan_of(file="榫.yaml").slots[0].name == "adapter"
    assert plan_of("name=home", "register=false").slots[0].register_as is None
    assert plan_of("register=other").slots[0].register_as == "other"


def test_shared_prefixes_only_without_dropout() -> None:
    assert plan_of().share_prefix
    plan = plan_of("lora.dropout=0.1")
    assert not plan.share_prefix
    assert any("dropout" in rejection.reason for rejection in plan.rejected)


# --- memory, time, disk


def with_memory(gigabytes: float) -> MachineFacts:
    return CPU.model_copy(update={"host_memory_bytes": round(gigabytes * GB)})


LONG = DataSize(rows=1000, mean_tokens=900.0, longest_tokens=2000, exact=True)


def test_layers_are_computed_again_only_when_it_does_not_fit_otherwise() -> None:
    assert plan_of(size=LONG, machine=with_memory(16)).keeping.counts == (30, 0, 0, 0)
    plan = plan_of(size=LONG, machine=with_memory(2.5))
    assert 0 < plan.keeping.all_layers < 30 and plan.keeping.host_layers == 0
    assert plan.estimate.memory_bytes < 0.9 * 2.5 * GB
    found = choice(plan, "checkpointing")
    assert found.value == "some layers" and f"keeps everything of {plan.keeping.all_layers} layers" in found.reason
    everything = next(one for one in plan.rejected if one.what == "keeping everything of all layers")
    assert everything.reason.startswith("needs about ")
    assert plan_of("checkpointing=none", size=LONG, machine=with_memory(16)).keeping.counts == (30, 0, 0, 0)
    full = plan_of("checkpointing=full", size=LONG, machine=with_memory(16))
    assert full.keeping.counts == (0, 0, 30, 0) and full.may_keep == ("input",)
    assert full.estimate.seconds > plan.estimate.seconds > plan_of(size=LONG).estimate.seconds


def test_p28_a_run_that_will_not_fit_is_refused_with_what_would_fit() -> None:
    error = refused("checkpointing=none", size=LONG, machine=with_memory(2.5))
    assert error.code == "plan-memory"
    assert "what would fit: checkpointing=auto" in error.hint
    error = refused(size=LONG, machine=with_memory(1.65))
    assert error.hint.startswith("what would fit: precision=bf16 or data.max_tokens=")
    for remedy in error.hint.removeprefix("what would fit: ").split(" or "):
        fitting = plan_of(*remedy.split(), size=LONG, machine=with_memory(1.65))
        assert fitting.estimate.memory_bytes < 0.9 * 1.65 * GB
    error = refused(size=LONG, machine=with_memory(0.5))
    assert "smaller base" in error.hint


def test_a_memory_of_its_own() -> None:
    """The fastest way within it; on a GPU what CUDA itself takes comes on top."""
    plan = plan_of("memory=2.2 GB", size=LONG, machine=with_memory(16))
    assert plan.memory_limit_bytes == 2_200_000_000 >= plan.estimate.memory_bytes
    assert plan.keeping.all_layers < 30
    found = choice(plan, "memory")
    assert (found.value, found.origin) == ("2.2 GB", "command line")
    assert f"about {plan.estimate.memory_bytes / 1e9:.1f} GB of it; keeps everything of " in found.reason
    assert plan_of().memory_limit_bytes is None and plan_of("memory=auto").memory_limit_bytes is None
    assert choice(plan_of(), "memory").value == "14.4 GB"
    error = refused("memory=1.5 GB", size=LONG, machine=with_memory(16))
    assert error.code == "plan-memory" and "1.5 GB may be used" in error.what
    assert error.hint.startswith("what would fit: memory=auto or ")
    # No limit makes more memory of what there is.
    assert refused("memory=8 GB", size=LONG, machine=with_memory(0.5)).code == "plan-memory"
    limited = plan_of("memory=20 GB", facts=LLAMA_8B, machine=H100, size=LONG, text=SMALL)
    assert 19 * GB < limited.estimate.memory_bytes <= 21.2 * GB


@pytest.mark.parametrize("written", ["8", "0 GB", "lots", "8600000000"])
def test_a_memory_without_a_unit_is_refused(written: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(SMALL, f'memory="{written}"')
    assert caught.value.code == "recipe-bad-value" and "memory" in caught.value.what


def test_p28_an_8b_base_on_a_small_gpu() -> None:
    error = refused("precision.base=same", facts=LLAMA_8B, machine=T4)
    assert error.code == "plan-memory"
    assert "base 16.3 GB" in error.got
    assert "what would fit: precision.base=nf4" in error.hint


def test_p23_room_for_checkpoints_is_checked_at_planning() -> None:
    error = refused(machine=CPU.model_copy(update={"free_disk_bytes": 200_000_000}))
    assert error.code == "plan-disk"
    assert plan_of("checkpoint.keep=1", machine=CPU.model_copy(update={"free_disk_bytes": 200_000_000}))


def test_memory_terms_agree_with_figures_measured_elsewhere() -> None:
    plan = plan_of("data.max_tokens=2048", facts=LLAMA_8B, machine=H100, size=LONG)
    assert 16 * GB < plan.estimate.memory_bytes < 72 * GB


def test_layers_below_the_first_adapted_one_cost_half() -> None:
    whole, upper = plan_of("lora.targets=qv"), plan_of("lora.targets=qv", "lora.layers=15-")
    assert upper.estimate.memory_bytes < whole.estimate.memory_bytes
    assert 0.65 < upper.estimate.seconds / whole.estimate.seconds < 0.95


def test_flops_agree_with_the_count_by_hand() -> None:
    flops = flops_per_token(LLAMA_8B, lora_parameters=0, row_tokens=2048, supervised_share=1.0)
    assert flops == pytest.approx(32.2e9, rel=0.02)
    # The forward pass again, without the product with down: 46.7e9 would be all of it.
    again = computed_twice(LLAMA_8B, 2048, Keeping(micro_tokens=1, all_layers=0, input_layers=32))
    assert flops + again == pytest.approx(46.7e9 - 32 * 2 * 14_336 * 4096, rel=0.02)
    half = computed_twice(LLAMA_8B, 2048, Keeping(micro_tokens=1, all_layers=16, most_layers=16))
    assert half == 16 * 2 * 2 * 14_336 * 4096


def test_trainable_parameters_are_counted_exactly() -> None:
    plan = plan_of()
    assert plan.estimate.trainable_parameters == 4_884_480
    assert adapter_parameters(SMOLLM2_135M, plan.slots[0].lora) == 4_884_480
    assert plan.estimate.trainable_share == pytest.approx(4_884_480 / SMOLLM2_135M.parameters)


def test_origin_of_an_unlisted_value_is_the_recipe() -> None:
    loaded = load().model_copy(update={"given": ()})
    plan = decide(loaded, base=base_of(), machine=CPU, data_size=SIZE)
    assert choice(plan, "base").origin == "recipe"
