"""config.json to facts: both spellings, every family's defaults; what is not done is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tenon.bases.facts import RopeFacts
from tenon.bases.families import FAMILIES
from tenon.bases.read import folder_facts
from tenon.errors import BaseModelError

PLAIN: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "vocab_size": 100,
}


def facts_of(folder: Path, tree: dict[str, Any]) -> Any:
    (folder / "config.json").write_text(json.dumps(PLAIN | tree))
    return folder_facts(folder)


def refused(folder: Path, tree: dict[str, Any]) -> BaseModelError:
    with pytest.raises(BaseModelError) as caught:
        facts_of(folder, tree)
    assert caught.value.hint and str(folder) in caught.value.what
    return caught.value


def test_published_configs_of_smollm2_and_llama_3(tmp_path: Path) -> None:
    """Keys and values as the configs of SmolLM2-135M-Instruct and Llama-3.2-1B-Instruct have them."""
    smollm2 = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "vocab_size": 49152,
    }
    facts = facts_of(tmp_path, smollm2)
    assert facts.parameters == 134_515_008
    assert (facts.head_dim, facts.rope, facts.tied_head) == (64, RopeFacts(theta=100_000.0), True)
    llama = {
        "model_type": "llama",
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
        "eos_token_id": [128001, 128008, 128009],
    }
    facts = facts_of(tmp_path, llama)
    assert facts.parameters == 1_235_814_400
    assert facts.rope == RopeFacts(
        kind="llama3", theta=500_000.0, factor=32.0, low_freq_factor=1.0, original_context_tokens=8192
    )
    assert facts.eos_ids == (128001, 128008, 128009)


@pytest.mark.parametrize(
    ("old", "rope"),
    [
        ({"rope_theta": 5e5}, RopeFacts(theta=5e5)),
        ({"rope_theta": 5e5, "rope_scaling": None}, RopeFacts(theta=5e5)),
        ({}, RopeFacts(theta=10_000.0)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, RopeFacts(kind="linear", factor=2.0)),
        ({"rope_scaling": {"rope_type": "default"}, "rope_theta": 7}, RopeFacts(theta=7.0)),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}},
            RopeFacts(kind="yarn", factor=4.0, original_context_tokens=1024),
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1024}},
            RopeFacts(kind="yarn", factor=4.0, original_context_tokens=1024),
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": None, "truncate": False}},
            RopeFacts(kind="yarn", factor=2.0, original_context_tokens=4096, truncate=False),
        ),
    ],
)
def test_rotary_settings_in_the_old_spelling_and_the_new(old: dict[str, Any], rope: RopeFacts, tmp_path: Path) -> None:
    assert facts_of(tmp_path, {"model_type": "llama", **old}).rope == rope
    new = dict(old.get("rope_scaling") or {})
    if "type" in new:
        new["rope_type"] = new.pop("type")
    new.setdefault("rope_theta", old.get("rope_theta", 10_000.0))
    assert facts_of(tmp_path, {"model_type": "llama", "rope_parameters": new}).rope == rope


def test_missing_keys_mean_what_transformers_takes_them_for(tmp_path: Path) -> None:
    assert len(FAMILIES) == 5
    llama = facts_of(tmp_path, {"model_type": "llama"})
    assert (llama.kv_heads, llama.head_dim, llama.tied_head, llama.norm_eps) == (4, 16, False, 1e-6)
    shape = {"num_attention_heads": 32, "hidden_size": 512}
    mistral = facts_of(tmp_path, {"model_type": "mistral", **shape})
    assert (mistral.kv_heads, mistral.window_layers) == (8, (4096,) * 4)
    qwen2 = facts_of(tmp_path, {"model_type": "qwen2", **shape})
    assert (qwen2.kv_heads, qwen2.qkv_bias, qwen2.output_bias, qwen2.window_layers) == (32, True, False, (0,) * 4)
    qwen3 = facts_of(tmp_path, {"model_type": "qwen3", **shape})
    assert (qwen3.head_dim, qwen3.qk_norm, qwen3.qkv_bias) == (128, True, False)
    smollm3 = facts_of(tmp_path, {"model_type": "smollm3", **shape})
    assert (smollm3.kv_heads, smollm3.tied_head, smollm3.rope.theta) == (4, True, 2e6)
    assert smollm3.rotary_layers == (True, True, True, False)
    assert facts_of(tmp_path, {"model_type": "mistral", **shape, "num_key_value_heads": None}).kv_heads == 32


@pytest.mark.parametrize(
    ("tree", "windows"),
    [
        ({"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 2}, (0, 0, 0, 0)),
        ({"model_type": "mistral", "sliding_window": 9, "num_key_value_heads": 2}, (9, 9, 9, 9)),
        ({"model_type": "qwen2", "sliding_window": 9, "num_key_value_heads": 2}, (0, 0, 0, 0)),
        (
            {"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 3},
            (0, 0, 0, 9),
        ),
        ({"model_type": "qwen3", "sliding_window": 9, "use_sliding_window": True}, (0, 0, 0, 0)),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 9,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (9, 0, 9, 0),
        ),
        (
            {
                "model_type": "smollm3",
                "sliding_window": 9,
                "use_sliding_window": True,
                "no_rope_layers": [1, 0, 1, 0, 1],
            },
            (0, 9, 0, 9),
        ),
    ],
)
def test_sliding_windows(tree: dict[str, Any], windows: tuple[int, ...], tmp_path: Path) -> None:
    assert facts_of(tmp_path, {"num_key_value_heads": 2, **tree}).window_layers == windows


def test_ids_of_the_generation_config_win(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    facts = facts_of(tmp_path, {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2})
    assert (facts.bos_id, facts.eos_ids) == (1, (5, 6))
    (tmp_path / "generation_config.json").unlink()
    assert facts_of(tmp_path, {"model_type": "llama", "eos_token_id": None}).eos_ids == ()


def test_what_the_files_keep_the_weights_in(tmp_path: Path) -> None:
    tree = {"model_type": "llama", "num_key_value_heads": 2}
    assert facts_of(tmp_path, tree).stored == facts_of(tmp_path, tree | {"quantization_config": None}).stored == "plain"
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    assert facts_of(tmp_path, tree | {"quantization_config": nf4}).stored == "nf4"


@pytest.mark.parametrize("model_type", ["gpt2", "gemma3", "qwen2_moe", "mixtral", None])
def test_an_unknown_architecture_lists_what_works(model_type: str | None, tmp_path: Path) -> None:
    error = refused(tmp_path, {"model_type": model_type} if model_type else {})
    assert error.code == "base-unknown-architecture"
    assert error.got == (model_type or "nothing")
    for family in FAMILIES:
        assert family.name in error.hint


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "quantization_config"),
        (
            {
                "quantization_config": {
                    "quant_method": "bitsandbytes",
                    "load_in_4bit": True,
                    "bnb_4bit_quant_type": "fp4",
                }
            },
            "quantization_config",
        ),
        ({"auto_map": {"AutoModelForCausalLM": "code.Model"}}, "auto_map"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"num_experts": 8}, "num_experts"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ({"no_rope_layers": [1, 0, 1, 0]}, "no_rope_layers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "mrope_section"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias"),
        ({"model_type": "qwen2", "mlp_bias": True}, "mlp_bias"),
        ({"model_type": "qwen3", "layer_types": ["chunked_attention"] * 4}, "layer_types"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ({"logits_scaling": 8.0}, "logits_scaling"),
    ],
)
def test_features_that_are_not_done_are_refused_by_name(tree: dict[str, Any], key: str, tmp_path: Path) -> None:
    error = refused(tmp_path, {"model_type": "llama", "num_key_value_heads": 2} | tree)
    assert error.code == "base-unsupported" and f" {key}:" in error.what


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "layer_types"),
    ],
)
def test_values_of_the_wrong_kind_are_refused_by_name(tree: dict[str, Any], key: str, tmp_path: Path) -> None:
    error = refused(tmp_path, {"model_type": "llama", "num_key_value_heads": 2} | tree)
    assert error.code == "base-config" and key in error.what


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_config_that_is_no_json_object(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BaseModelError) as caught:
        folder_facts(tmp_path)
    assert caught.value.code == "base-config"


def test_a_folder_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError) as caught:
        folder_facts(tmp_path)
    assert caught.value.code == "base-not-a-model"
