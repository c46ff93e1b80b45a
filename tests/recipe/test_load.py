"""A recipe comes in whole, with where each value came from; every way to get it wrong ends with one clear error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tenon.errors import RecipeError
from tenon.recipe.fields import full_key, leaf_fields
from tenon.recipe.load import Loaded, load_recipe, parse_recipe
from tenon.recipe.schema import Recipe
from tenon.recipe.written import read_override

SMALL = "base: smollm2-135m\ndata:\n  train: rows.jsonl\n"


def parse(text: str, *overrides: str) -> Loaded:
    return parse_recipe(text, overrides, file=Path("/recipes/my.yaml"), working_folder=Path("/work"))


def refused(text: str, *overrides: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        parse(text, *overrides)
    return caught.value


def test_ten_lines_do() -> None:
    loaded = parse(SMALL)
    assert loaded.recipe.base == "smollm2-135m"
    assert [source.path for source in loaded.recipe.data.train] == ["rows.jsonl"]
    assert loaded.recipe.lora.rank is None


def test_number_of_fields_stays_small() -> None:
    # Ten of them say how the adapter is asked once it is served.
    assert 55 <= len(leaf_fields()) <= 80


def test_every_field_is_described() -> None:
    assert all(leaf.description.endswith(".") for leaf in leaf_fields())


def test_sources_are_paths_or_mappings() -> None:
    loaded = parse("base: b\ndata:\n  train:\n    - a.jsonl\n    - {path: b.csv, weight: 0.5, columns: {text: body}}\n")
    first, second = loaded.recipe.data.train
    assert (first.path, first.weight, first.format) == ("a.jsonl", 1.0, "auto")
    assert (second.path, second.weight, second.columns) == ("b.csv", 0.5, {"text": "body"})


@pytest.mark.parametrize(
    ("word", "base", "compute"),
    [
        ("bf16", None, "bf16"),
        ("auto", None, "auto"),
        ("nf4", "nf4", None),
        ("fp8", "fp8", None),
        ("same", "same", None),
    ],
)
def test_one_word_may_stand_for_the_precision(word: str, base: str | None, compute: str | None) -> None:
    for loaded in (parse(SMALL + f"precision: {word}\n"), parse(SMALL, f"precision={word}")):
        assert (loaded.recipe.precision.base, loaded.recipe.precision.compute) == (base, compute)
    whole = parse(SMALL + "precision: {base: int8, compute: fp32}\n", f"precision={word}").recipe.precision
    assert (whole.base, whole.compute) == (base or "int8", compute or "fp32")


def test_a_word_and_the_key_that_it_stands_for_are_one_key_twice() -> None:
    assert refused(SMALL + "precision: bf16\nprecision.compute: fp32\n").code == "recipe-duplicate-key"
    assert refused(SMALL, "precision=nf4", "precision.base=fp8").code == "recipe-duplicate-key"
    assert parse(SMALL + "precision: bf16\n", "precision=null").recipe.precision.compute is None


def test_a_wrong_precision_names_the_right_ones() -> None:
    error = refused(SMALL + "precision: bf15\n")
    assert error.code == "recipe-bad-value" and "bf16" in error.hint
    assert refused(SMALL + "precision: {products: fp8}\n").code == "recipe-inapplicable"


def test_values_remember_who_wrote_them() -> None:
    loaded = parse(SMALL + "lora: {rank: 8}\nlora_alpha: 4\n", "optimizer.lr=1e-3")
    rank, alpha, rate = (loaded.origin(key) for key in ("lora.rank", "lora.alpha", "optimizer.lr"))
    assert rank is not None and (rank.origin, rank.where) == ("recipe", "my.yaml:4")
    assert alpha is not None and (alpha.origin, alpha.where) == ("alias", "my.yaml:5, as lora_alpha")
    assert rate is not None and (rate.origin, rate.where) == ("command line", "command line")
    assert loaded.origin("lora.dropout") is None


def test_the_command_line_wins_over_the_file() -> None:
    assert parse(SMALL + "lora: {rank: 8}\n", "lora.rank=32").recipe.lora.rank == 32
    assert parse(SMALL + "lora_r: 8\n", "lora.rank=32").recipe.lora.rank == 32
    assert parse(SMALL + "lora: {rank: 8}\n", "lora_r=32").recipe.lora.rank == 32


def test_null_gives_a_value_back_to_the_planner() -> None:
    loaded = parse(SMALL + "lora: {rank: 8}\nname:\n", "lora.rank=null")
    assert loaded.recipe.lora.rank is None
    assert loaded.origin("lora.rank") is None
    assert loaded.origin("name") is None


def test_dotted_keys_and_empty_sections_are_fine() -> None:
    assert parse(SMALL + "lora.rank: 8\nschedule:\n").recipe.lora.rank == 8


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-3", -3),
        ("1_000", 1000),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2001-01-01", "2001-01-01"),
        ("yes", True),
        ("off", False),
        ("~", None),
        ("", None),
        ("[a, 2]", ["a", 2]),
        ("'5'", "5"),
        ("Ask: {text}", "Ask: {text}"),
        ("{text}", "{text}"),
        ("a # b", "a # b"),
        ("a=b", "a=b"),
    ],
)
def test_overrides_are_yaml_scalars(text: str, value: object) -> None:
    read = read_override(f"data.prompt={text}", full_key)
    assert (read.key, read.value, type(read.value)) == ("data.prompt", value, type(value))


@given(st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.none()))
def test_overrides_read_back_what_json_writes(value: object) -> None:
    read = read_override(f"some.key = {json.dumps(value)}", full_key).value
    assert read == value and type(read) is type(value)


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"])))
def test_overrides_read_back_quoted_text(text: str) -> None:
    quoted = "'" + text.replace("'", "''") + "'"
    assert read_override(f"data.system={quoted}", full_key).value == text


SETTINGS = st.fixed_dictionaries(
    {"base": st.sampled_from(["smollm2-135m", "./folder", "org/name"])},
    optional={
        "lora": st.fixed_dictionaries(
            {},
            optional={
                "rank": st.integers(1, 512),
                "alpha": st.floats(0.1, 1000),
                "targets": st.sampled_from(["all", "qv", ["q_proj", "v_proj"], r"layers\.\d+\.mlp\..*"]),
                "layers": st.sampled_from(["8-15", "3", [1, 2], 4]),
                "rslora": st.booleans(),
            },
        ),
        "optimizer": st.fixed_dictionaries({}, optional={"lr": st.floats(1e-6, 1), "kind": st.just("adamw")}),
        "limits": st.fixed_dictionaries({}, optional={"epochs": st.integers(1, 9), "steps": st.integers(1, 10**6)}),
        "register": st.sampled_from([True, False, "my-adapter"]),
        "seed": st.integers(0, 2**62),
        "trackers": st.lists(st.sampled_from(["wandb", "mlflow"]), unique=True),
    },
)


@given(SETTINGS, st.randoms(use_true_random=False))
def test_round_trip_and_stable_hash(tree: dict[str, object], random: object) -> None:
    tree = {**tree, "data": {"train": "rows.jsonl"}}
    recipe = parse(yaml.safe_dump(tree)).recipe
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe.from_json(recipe.to_json()).content_hash == recipe.content_hash
    turned = dict(reversed(tree.items()))
    assert parse("# a comment\n" + yaml.safe_dump(turned, sort_keys=False)).recipe.content_hash == recipe.content_hash


def test_hash_ignores_where_the_recipe_lies_but_not_what_it_says() -> None:
    here = parse(SMALL).recipe
    there = parse_recipe(SMALL, file=Path("/elsewhere/other.yaml"), working_folder=Path("/"))
    assert there.recipe.content_hash == here.content_hash
    assert parse(SMALL, "seed=1").recipe.content_hash != here.content_hash


def test_loaded_survives_a_round_trip() -> None:
    loaded = parse(SMALL + "adapter: lora\n", "lora.rank=8")
    assert Loaded.from_json(loaded.to_json()) == loaded


def test_paths_resolve_against_the_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "recipes"
    (folder / "base").mkdir(parents=True)
    (folder / "my.yaml").write_text("base: base\ndata:\n  train: ../rows.jsonl\n", encoding="utf-8")
    loaded = load_recipe(folder / "my.yaml")
    assert loaded.resolve("../rows.jsonl") == str(tmp_path / "rows.jsonl")
    assert loaded.resolve("/rows.jsonl") == "/rows.jsonl"
    assert loaded.base_spec == str(folder / "base")


def test_names_and_hub_ids_are_no_paths(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(SMALL, encoding="utf-8")
    loaded = load_recipe(tmp_path / "my.yaml")
    assert loaded.base_spec == "smollm2-135m"
    assert loaded.resolve_source("org/rows") == "org/rows"
    assert loaded.resolve_source("hf://org/rows") == "hf://org/rows"
    assert loaded.resolve_source("data/rows.jsonl") == str(tmp_path / "data" / "rows.jsonl")
    assert loaded.resolve_source("*.jsonl") == str(tmp_path / "*.jsonl")


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_utf8_with_and_without_mark(tmp_path: Path, bom: bytes) -> None:
    path = tmp_path / "榫.yaml"
    path.write_bytes(bom + (SMALL + "name: a\n").encode() + "# 榫\n".encode())
    assert load_recipe(path).recipe.name == "a"


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="recipe-missing"):
        load_recipe(tmp_path / "no.yaml")


def test_folder_instead_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="recipe-not-a-file"):
        load_recipe(tmp_path)


def test_wrong_encoding(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_bytes("base: größe\n".encode("latin-1"))
    with pytest.raises(RecipeError, match="recipe-encoding"):
        load_recipe(path)


def test_data_instead_of_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": []}\n' * 100_000, encoding="utf-8")
    with pytest.raises(RecipeError, match="recipe-too-large"):
        load_recipe(path)


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_empty(text: str) -> None:
    assert refused(text).code in ("recipe-empty", "recipe-not-mapping")


@pytest.mark.parametrize("text", ["- a\n", "just words\n", "3\n"])
def test_not_a_mapping(text: str) -> None:
    assert refused(text).code == "recipe-not-mapping"


@pytest.mark.parametrize(
    "text",
    [
        "a: [1\n",
        "a: b: c\n",
        "\tb: 1\n",
        "a: 1\n---\nb: 2\n",
        "a: !!python/object/apply:os.getcwd []\n",
        "a: \x00\n",
        "a: &a [*a]\n",
        "a: " + "[" * 3000,
        "? [a]\n: b\n",
        "a: *nowhere\n",
    ],
)
def test_not_yaml(text: str) -> None:
    error = refused(text)
    assert error.code == "recipe-not-yaml"
    assert "my.yaml" in error.what


def test_small_files_cannot_unfold_into_large_trees() -> None:
    rungs = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
    assert refused("a0: &a0 [x, x]\n" + rungs).code == "recipe-not-yaml"


@pytest.mark.parametrize(
    "text",
    [SMALL + "seed: 1\nseed: 1\n", SMALL + "lora: {rank: 1, rank: 2}\n", SMALL + "lora: {rank: 1}\nlora.rank: 2\n"],
)
def test_duplicate_keys(text: str) -> None:
    error = refused(text)
    assert error.code == "recipe-duplicate-key"
    assert "my.yaml:" in error.what


def test_duplicate_overrides() -> None:
    assert refused(SMALL, "seed=1", "seed=2").code == "recipe-duplicate-key"


@pytest.mark.parametrize("argument", ["lora.rank", "=3", "--rank 3", "lora.targets=[a"])
def test_overrides_of_another_form(argument: str) -> None:
    assert refused(SMALL, argument).code == "recipe-override"


@pytest.mark.parametrize("text", ["base: b\n", "data: {train: a}\n"])
def test_missing_keys(text: str) -> None:
    error = refused(text)
    assert error.code == "recipe-missing-key"
    assert error.hint.startswith("add ")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("lora: {rank: x}", "`lora.rank` must be a whole number"),
        ('lora: {rank: "16"}', "`lora.rank` must be a whole number"),
        ("lora: {rank: 1.5}", "`lora.rank` must be a whole number"),
        ("lora: {rank: true}", "`lora.rank` must be a whole number"),
        ("lora: {rank: 0}", "greater than or equal to 1"),
        ("lora: {layers: upper}", "`lora.layers`"),
        ("lora: 16", "`lora` is a section"),
        ("name: my adapter", "`name`"),
        ("name: 7", "`name` must be text"),
        ("optimizer: {lr: .inf}", "`optimizer.lr` must be a number"),
        ("schedule: {kind: cosin}", "`schedule.kind`"),
        ("trackers: [wandb, comet]", "`trackers[1]`"),
        ("seed: -1", "`seed`"),
        ("evaluate: {data: []}", "`evaluate.data`"),
    ],
)
def test_bad_values_name_file_line_and_key(line: str, says: str) -> None:
    error = refused(SMALL + line + "\n")
    assert error.code == "recipe-bad-value"
    assert "my.yaml:4" in error.what
    assert says in error.what
    assert error.hint


def test_bad_words_get_the_nearest_one() -> None:
    assert "`cosine`" in refused(SMALL + "schedule: {kind: cosin}\n").hint


def test_bad_values_inside_sources() -> None:
    assert "data.train[1].weight" in refused("base: b\ndata: {train: [a, {path: b, weight: x}]}\n").what
    assert "data.train[0].path` is missing" in refused("base: b\ndata: {train: [{weight: 1}]}\n").what
    error = refused("base: b\ndata: {train: [{path: b, wieght: 1}]}\n")
    assert error.code == "recipe-unknown-key"
    assert "`weight`" in error.hint


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lora.rnak", "lora.rank"),
        ("rank", "lora.rank"),
        ("lora.r", "lora.rank"),
        ("epochs", "limits.epochs"),
        ("train.epochs", "limits.epochs"),
        ("lr", "optimizer.lr"),
        ("optimizer.learning_rate", "optimizer.lr"),
        ("lora_rnak", "lora.rank"),
        ("sede", "seed"),
        ("data.trian", "data.train"),
        ("batch.row", "batch.rows"),
        ("scheduler.warmup", "schedule.warmup"),
        ("checkpointin", "checkpointing"),
    ],
)
def test_p25_unknown_keys_are_refused_with_the_nearest_name(key: str, meant: str) -> None:
    for error in (refused(SMALL + f"{key}: 1\n"), refused(SMALL, f"{key}=1")):
        assert error.code == "recipe-unknown-key"
        assert f"`{key}`" in error.what
        assert f"`{meant}`" in error.hint


def test_p25_keys_like_nothing_point_to_the_list() -> None:
    assert refused(SMALL + "zzz: 1\n").hint == "docs/recipe.md lists every key"


@pytest.mark.parametrize(
    ("lines", "key"),
    [
        ("schedule: {kind: linear, cycles: 3}", "schedule.cycles"),
        ("schedule: {cycles: 3}", "schedule.cycles"),
        ("schedule: {kind: cosine, decay: 0.2}", "schedule.decay"),
        ("schedule: {kind: constant, floor: 0.1}", "schedule.floor"),
        ("optimizer: {kind: adamw, momentum: 0.9}", "optimizer.momentum"),
        ("optimizer: {momentum: 0.9}", "optimizer.momentum"),
        ("optimizer: {kind: sgd, beta1: 0.9}", "optimizer.beta1"),
        ("optimizer: {kind: sgd, beta2: 0.9}", "optimizer.beta2"),
        ("optimizer: {kind: sgd, eps: 1e-8}", "optimizer.eps"),
        ("batch: {rows: 8, tokens: 1000}", "batch.rows"),
        ("data.heldout: 0.1\ndata.validation: v.jsonl", "data.heldout"),
        ("data.heldout_by: content", "data.heldout_by"),
        ("data.heldout: 0\ndata.heldout_by: content", "data.heldout_by"),
        ("data.heldout: 0\nvalidation: {every: 5}", "validation.every"),
        ("data.heldout: 0\nvalidation: {metric: loss}", "validation.metric"),
        ("data.heldout: 0\nvalidation: {rows: 5}", "validation.rows"),
        ("validation: {patience: 3}", "validation.patience"),
        ("validation: {every: 0, patience: 3}", "validation.patience"),
        ("validation: {every: 5, min_delta: 0.1}", "validation.min_delta"),
        ("lora: {start_from: old, init: gaussian}", "lora.init"),
        ("evaluate: {metrics: [], data: t.jsonl}", "evaluate.data"),
        ("evaluate: {metrics: [], rows: 5}", "evaluate.rows"),
    ],
)
def test_p25_keys_that_do_not_apply_are_refused(lines: str, key: str) -> None:
    error = refused(SMALL + lines + "\n")
    assert error.code == "recipe-inapplicable"
    assert f"`{key}` does not apply to this run" in error.what
    assert error.what.startswith("my.yaml:")
    assert error.hint


@pytest.mark.parametrize(
    "lines",
    [
        "schedule: {kind: cosine_restarts, cycles: 3}",
        "schedule: {kind: wsd, decay: 0.2, floor: 0.1}",
        "optimizer: {kind: sgd, momentum: 0.9}",
        "batch: {tokens: 1000}",
        "data.heldout: 0.1\ndata.heldout_by: content",
        "validation: {every: 5, patience: 3, min_delta: 0.1}",
        "evaluate: {metrics: []}",
    ],
)
def test_keys_that_apply_are_accepted(lines: str) -> None:
    parse(SMALL + lines + "\n")
