"""Keys of other tools: understood where they mean exactly the same, refused with the difference where they do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tenon.errors import RecipeError
from tenon.recipe.aliases import ALIASES, ALWAYS, DIFFERENT, PAIRED, Alias
from tenon.recipe.fields import leaf_fields, section_names
from tenon.recipe.load import Loaded, parse_recipe

SMALL = "base: b\ndata: {train: rows.jsonl}\n"


def parse(text: str, *overrides: str) -> Loaded:
    return parse_recipe(text, overrides, file=Path("/recipes/my.yaml"), working_folder=Path("/work"))


def refused(text: str, *overrides: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        parse(text, *overrides)
    return caught.value


def value_of(loaded: Loaded, key: str) -> object:
    tree = loaded.recipe.model_dump()
    for part in key.split("."):
        tree = tree[part]
    return tree


# One example of each alias: what is written there, and what it is here.
EXAMPLES: dict[str, tuple[str, object]] = {
    "base_model": ("org/name", "org/name"),
    "model_name_or_path": ("org/name", "org/name"),
    "base_model_name_or_path": ("org/name", "org/name"),
    "lora_r": ("8", 8),
    "lora_rank": ("8", 8),
    "r": ("8", 8),
    "lora_alpha": ("16", 16.0),
    "lora_dropout": ("0.05", 0.05),
    "lora_target_modules": ("[q_proj, v_proj]", ("q_proj", "v_proj")),
    "lora_target": ("q_proj,v_proj", ("q_proj", "v_proj")),
    "target_modules": ("all-linear", "all"),
    "lora_target_linear": ("true", "all"),
    "peft_layers_to_transform": ("[1, 2]", (1, 2)),
    "layers_to_transform": ("3", (3,)),
    "use_rslora": ("true", True),
    "peft_use_rslora": ("true", True),
    "init_lora_weights": ("gaussian", "gaussian"),
    "peft_init_lora_weights": ("true", "kaiming"),
    "lora_model_dir": ("./old", "./old"),
    "adapter_name_or_path": ("./old", "./old"),
    "loraplus_lr_ratio": ("16", 16.0),
    "learning_rate": ("2e-4", 2e-4),
    "optimizer": ("adamw_torch", "adamw"),
    "optim": ("adamw_8bit", "adamw8bit"),
    "weight_decay": ("0.01", 0.01),
    "adam_beta1": ("0.8", 0.8),
    "adam_beta2": ("0.95", 0.95),
    "adam_epsilon": ("1e-6", 1e-6),
    "max_grad_norm": ("0.3", 0.3),
    "lr_scheduler": ("linear", "linear"),
    "lr_scheduler_type": ("constant_with_warmup", "constant"),
    "warmup_ratio": ("0.1", 0.1),
    "warmup_steps": ("20", 20.0),
    "cosine_min_lr_ratio": ("0.1", 0.1),
    "num_epochs": ("2", 2.0),
    "num_train_epochs": ("2.5", 2.5),
    "max_steps": ("100", 100),
    "sequence_len": ("512", 512),
    "cutoff_len": ("512", 512),
    "max_length": ("512", 512),
    "max_seq_length": ("512", 512),
    "val_set_size": ("0.1", 0.1),
    "val_size": ("0.1", 0.1),
    "train_on_inputs": ("true", "all"),
    "train_on_prompt": ("true", "all"),
    "mask_history": ("true", "last"),
    "assistant_only_loss": ("true", "assistant"),
    "completion_only_loss": ("true", "assistant"),
    "default_system": ("Be short.", "Be short."),
    "preprocessing_num_workers": ("4", 4),
    "dataset_num_proc": ("4", 4),
    "dataset_processes": ("4", 4),
    "gradient_checkpointing": ("true", "full"),
    "activation_checkpointing": ("false", "none"),
    "eval_steps": ("50", 50),
    "metric_for_best_model": ("eval_loss", "loss"),
    "save_steps": ("50", 50),
    "save_total_limit": ("3", 3),
    "report_to": ("wandb", ("wandb",)),
    "output_dir": ("./out", "./out"),
}
NEEDS_MORE = {
    "early_stopping_patience": ("eval_steps: 5\nearly_stopping_patience: 3", 3),
    "early_stopping_steps": ("eval_steps: 5\nearly_stopping_steps: 3", 3),
}


@pytest.mark.parametrize("alias", ALIASES, ids=lambda alias: alias.key)
def test_p26_each_alias_is_understood_and_its_canonical_name_recorded(alias: Alias) -> None:
    if alias.key in NEEDS_MORE:
        lines, value = NEEDS_MORE[alias.key]
    else:
        written, value = EXAMPLES[alias.key]
        lines = f"{alias.key}: {written}"
    text = "data: {train: rows.jsonl}\n" if alias.canonical == "base" else SMALL
    loaded = parse(f"{text}{lines}\n")
    assert value_of(loaded, alias.canonical) == value
    found = loaded.origin(alias.canonical)
    assert found is not None
    assert found.origin == "alias"
    assert found.where.endswith(f", as {alias.key}")


def test_p26_the_tables_hold_together() -> None:
    keys = [alias.key for alias in ALIASES]
    assert len(keys) == len(set(keys)) == 62
    ours = {leaf.key for leaf in leaf_fields()}
    assert {alias.canonical for alias in ALIASES} <= ours
    foreign = set(keys) | set(ALWAYS) | set(DIFFERENT) | set(PAIRED)
    assert not foreign & ours
    assert foreign & set(section_names()) == {"optimizer"}
    assert not set(keys) & (set(ALWAYS) | set(DIFFERENT))


@pytest.mark.parametrize("key", sorted(DIFFERENT))
def test_p26_near_misses_are_refused_with_the_difference(key: str) -> None:
    error = refused(SMALL + f"{key}: 1\n")
    assert error.code == "recipe-alias-differs"
    assert f"my.yaml:3: `{key}` has no exact equal here" in error.what
    assert DIFFERENT[key] in error.what


def test_p26_what_tenon_always_does_is_accepted_and_kept_for_printing() -> None:
    lines = {key: {True: "true", False: "false"}.get(value, value) for key, value in ALWAYS.items()}
    loaded = parse(SMALL + "".join(f"{key}: {value}\n" for key, value in lines.items()))
    assert {given.key for given in loaded.always} == set(ALWAYS)
    assert {given.key for given in loaded.given} == {"base", "data.train"}


@pytest.mark.parametrize("key", sorted(set(ALWAYS)))
def test_p26_and_refused_with_any_other_value(key: str) -> None:
    assert refused(SMALL + f"{key}: other\n").code == "recipe-alias-differs"


def test_p26_unset_keys_of_other_tools_say_nothing() -> None:
    lines = "early_stopping_patience:\nlora_model_dir:\nwandb_project:\nfp16:\nbf16: auto\nmax_steps: -1\n"
    loaded = parse(SMALL + lines)
    assert {given.key for given in loaded.given} == {"base", "data.train", "precision.compute"}


def test_p26_an_axolotl_file_without_its_data_list() -> None:
    loaded = parse(
        "base_model: org/name\nadapter: lora\nload_in_8bit: false\nload_in_4bit: false\nsequence_len: 1024\n"
        "sample_packing: false\nlora_r: 32\nlora_alpha: 16\nlora_dropout: 0.05\nlora_target_linear: true\n"
        "gradient_accumulation_steps: 4\nmicro_batch_size: 2\nnum_epochs: 4\noptimizer: adamw_bnb_8bit\n"
        "lr_scheduler: cosine\nlearning_rate: 0.0002\ntrain_on_inputs: false\nbf16: auto\nfp16:\n"
        "gradient_checkpointing: true\nwarmup_steps: 10\nweight_decay: 0.0\nval_set_size: 0.05\n"
        "data: {train: rows.jsonl}\n"
    )
    recipe = loaded.recipe
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets) == (32, 16.0, "all")
    assert (recipe.batch.rows, recipe.optimizer.kind, recipe.schedule.warmup) == (8, "adamw8bit", 10.0)
    assert (recipe.precision.compute, recipe.precision.base) == ("auto", "same")
    assert (recipe.checkpointing, recipe.data.heldout) == ("full", 0.05)


@pytest.mark.parametrize(
    ("lines", "rows"),
    [
        ("per_device_train_batch_size: 8", 8),
        ("micro_batch_size: 2", 2),
        ("per_device_train_batch_size: 8\ngradient_accumulation_steps: 4", 32),
        ("micro_batch_size: 2\ngradient_accumulation_steps: 4", 8),
    ],
)
def test_p26_rows_of_a_step_are_a_product(lines: str, rows: int) -> None:
    assert parse(SMALL + lines + "\n").recipe.batch.rows == rows


def test_p26_one_factor_may_be_typed_and_the_other_stand_in_the_file() -> None:
    loaded = parse(SMALL + "per_device_train_batch_size: 8\n", "gradient_accumulation_steps=4")
    assert loaded.recipe.batch.rows == 32
    assert parse(SMALL + "per_device_train_batch_size: 8\n", "batch.rows=5").recipe.batch.rows == 5


@pytest.mark.parametrize(
    "lines",
    [
        "gradient_accumulation_steps: 4",
        "per_device_train_batch_size: 8\nmicro_batch_size: 8",
        "per_device_train_batch_size: auto",
        "micro_batch_size: 0",
        "max_steps: 100\nnum_train_epochs: 3",
        "max_steps: many",
        "bf16: true\nfp16: true",
        "bf16: false",
        "fp16: auto",
        "bf16: full",
        "optimizer: adafactor",
        "optim: paged_adamw_8bit",
        "lr_scheduler_type: cosine_with_restarts",
        "lr_scheduler_type: warmup_stable_decay",
        "lora_target_modules: .*q_proj",
        "target_modules: [self_attn.q_proj]",
        "init_lora_weights: pissa",
        "init_lora_weights: false",
        "adapter_name_or_path: a,b",
        "warmup_ratio: 1.5",
        "warmup_steps: -1",
        "eval_steps: 0.1",
        "save_steps: 0.1",
        "val_size: 100",
        "assistant_only_loss: false",
        "gradient_checkpointing: offload",
        "metric_for_best_model: accuracy",
        "report_to: all",
        "eval_strategy: epoch",
        "eval_strategy: steps",
        "learning_rate: fast",
        "lora_target_linear: 1",
        "load_in_8bit: true",
        "load_in_4bit: true",
        "load_in_4bit: 1",
        "load_in_4bit: true\nuse_bnb_nested_quant: false",
        "load_in_4bit: true\nuse_bnb_nested_quant: true\nbnb_4bit_quant_type: fp4",
        "use_bnb_nested_quant: true",
        "adapter: qlora\nload_in_4bit: false",
        "quantization_bit: 8",
        "quantization_bit: true",
        "quantization_bit: 4\nquantization_method: hqq",
        "quantization_bit: 4\ndouble_quantization: false",
    ],
)
def test_p26_values_without_an_exact_equal_are_refused(lines: str) -> None:
    error = refused(SMALL + lines + "\n")
    assert error.code == "recipe-alias-differs"
    assert "has no exact equal here: " in error.what


@pytest.mark.parametrize(
    ("lines", "base"),
    [
        ("adapter: qlora", "nf4"),
        ("adapter: qlora\nload_in_4bit: true\nload_in_8bit: false", "nf4"),
        ("load_in_4bit: true\nuse_bnb_nested_quant: true", "nf4"),
        ("load_in_4bit: true\nbnb_4bit_use_double_quant: true\nbnb_4bit_quant_type: nf4", "nf4"),
        ("quantization_bit: 4", "nf4"),
        ("quantization_bit: 4\nquantization_method: bnb\nquantization_type: nf4\ndouble_quantization: true", "nf4"),
        ("load_in_4bit: false", "same"),
        ("adapter: lora\nload_in_8bit: false", "same"),
        ("adapter: lora", None),
    ],
)
def test_p26_a_quantised_base(lines: str, base: str | None) -> None:
    loaded = parse(SMALL + lines + "\n")
    assert loaded.recipe.precision.base == base
    found = loaded.origin("precision.base")
    assert (found is not None and ", as " in found.where) == (base is not None)


def test_p26_of_a_quantised_base_one_key_may_be_typed() -> None:
    loaded = parse(SMALL + "use_bnb_nested_quant: true\nload_in_4bit: false\nbf16: true\n", "load_in_4bit=true")
    assert (loaded.recipe.precision.base, loaded.recipe.precision.compute) == ("nf4", "bf16")
    assert (
        parse(
            SMALL + "load_in_4bit: false\nadapter: lora\n", "adapter=qlora", "load_in_4bit=true"
        ).recipe.precision.base
        == "nf4"
    )


def test_p26_strategies_that_repeat_their_steps_are_accepted() -> None:
    loaded = parse(SMALL + "eval_strategy: steps\neval_steps: 20\nsave_strategy: steps\nsave_steps: 10\n")
    assert (loaded.recipe.validation.every, loaded.recipe.checkpoint.every) == (20, 10)


def test_p26_constant_there_has_no_warmup() -> None:
    assert parse(SMALL + "lr_scheduler_type: constant\n").recipe.schedule.warmup == 0.0
    assert refused(SMALL + "lr_scheduler_type: constant\nwarmup_ratio: 0.1\n").code == "recipe-alias-clash"


def test_two_names_for_one_thing_must_agree() -> None:
    error = refused(SMALL + "lora_r: 8\nlora: {rank: 16}\n")
    assert error.code == "recipe-alias-clash"
    assert "my.yaml:3, as lora_r" in error.what
    assert parse(SMALL + "lora_r: 8\nlora: {rank: 8}\n").recipe.lora.rank == 8
    assert refused(SMALL + "train_on_inputs: true\ncompletion_only_loss: true\n").code == "recipe-alias-clash"
