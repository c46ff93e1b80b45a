"""Every value is shown with where it came from, and the summary marks what is rough."""

from __future__ import annotations

from tenon.plan.combine import combine
from tenon.plan.decide import decide
from tenon.plan.explain import coverage, explain_rows, plan_rows
from tenon.recipe.fields import leaf_fields

from .situations import CPU, SIZE, SMALL, SMOLLM2_135M, base_of, load, plan_of


def test_explain_shows_every_field_in_order() -> None:
    loaded = load(SMALL + "lora: {rank: 8}\nlora_alpha: 4\nadapter: lora\n", "optimizer.lr=1e-4")
    plan = decide(loaded, base=base_of(), machine=CPU, data_size=SIZE)
    rows = explain_rows(loaded, plan)
    keys = [leaf.key for leaf in leaf_fields()]
    assert [row.key for row in rows[: len(keys)]] == keys
    found = {row.key: (row.value, row.origin) for row in rows}
    assert found["lora.rank"] == ("8", "recipe")
    assert found["lora.alpha"] == ("4", "alias")
    assert found["optimizer.lr"] == ("0.0001", "command line")
    assert found["lora.dropout"] == ("0", "default")
    assert found["batch.micro_tokens"] == ("2048", "derived")
    assert found["adapter"] == ("as always", "alias")
    assert all(row.reason for row in rows)


def test_p13_the_summary_prints_coverage_and_share() -> None:
    plan = plan_of("lora.targets=qv", "lora.layers=15-")
    text = "\n".join(f"{row.what}: {row.value} {row.note}" for row in plan_rows(plan))
    assert "30 of 210 matrices (q, v in 15 of 30 layers)" in text
    assert f"trainable: {plan.estimate.trainable_parameters:,}" in text
    assert "% of the base's 134.5M" in text
    assert coverage(plan_of().slots[0], SMOLLM2_135M.layers).startswith(
        "210 of 210 matrices (q, k, v, o, gate, up, down"
    )


def test_estimates_are_marked_rough_and_counts_are_not() -> None:
    rough = {row.what: row.rough for row in plan_rows(plan_of()) if row.group == "cost"}
    assert rough == {
        "trainable": False,
        "rows": False,
        "steps": False,
        "tokens": True,
        "memory": True,
        "time": True,
        "disk": True,
    }
    sampled = plan_rows(plan_of(size=SIZE.model_copy(update={"exact": False})))
    assert {row.what for row in sampled if row.rough} >= {"rows", "steps"}


def test_every_slot_of_a_run_is_shown() -> None:
    rows = plan_rows(combine([plan_of(file="a.yaml"), plan_of("data.heldout=0", "limits.minutes=5", file="b.yaml")]))
    shown = {row.what: row for row in rows if row.group == "adapter"}
    assert {"a", "b"} <= set(shown)
    assert [row.value for row in rows if row.what == "ends after"] == ["3 epochs", "5 minutes"]
    assert [row.note for row in rows if row.what == "train"] == [
        "validation: 5.0% held out, every 18 steps",
        "no validation",
    ]


def test_what_layers_keep_is_said() -> None:
    def note(*overrides: str) -> str:
        return next(row.note for row in plan_rows(plan_of(*overrides)) if row.what == "tokens at once")

    assert note("checkpointing=full") == "30 layers computed again"
    assert note() == "keeps everything, computes nothing twice"
