"""Tiny random bases of every family, made with transformers, as folders and as GGUF files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

VOCAB = 288
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# So short an original context that the rows of the tests reach every part of the scaling.
LLAMA3_SHORT = {**LLAMA3_ROPE, "rope_theta": 100.0, "original_max_position_embeddings": 64}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
SLIDING, FULL = "sliding_attention", "full_attention"

# Every family and variant that Tenon claims to run.
VARIANTS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SHAPE),
    "llama-tied": lambda: LlamaConfig(**_SHAPE, tie_word_embeddings=True, rms_norm_eps=1e-5),
    "llama-no-groups": lambda: LlamaConfig(**{**_SHAPE, "num_key_value_heads": 4}),
    "llama-head-dim": lambda: LlamaConfig(**_SHAPE, head_dim=24),
    "llama-biases": lambda: LlamaConfig(**_SHAPE, attention_bias=True, mlp_bias=True),
    "llama-rope-llama3": lambda: LlamaConfig(**_SHAPE, rope_parameters=LLAMA3_ROPE),
    "llama-rope-llama3-short": lambda: LlamaConfig(**_SHAPE, rope_parameters=LLAMA3_SHORT),
    "llama-rope-linear": lambda: LlamaConfig(**_SHAPE, rope_parameters=LINEAR_ROPE),
    "mistral": lambda: MistralConfig(**_SHAPE, sliding_window=None),
    "mistral-window": lambda: MistralConfig(**_SHAPE, sliding_window=7),
    "qwen2": lambda: Qwen2Config(**_SHAPE),
    "qwen2-tied-rope-yarn": lambda: Qwen2Config(**_SHAPE, tie_word_embeddings=True, rope_parameters=YARN_ROPE),
    "qwen2-window": lambda: Qwen2Config(**_SHAPE, use_sliding_window=True, sliding_window=7, max_window_layers=2),
    "qwen3": lambda: Qwen3Config(**_SHAPE, head_dim=32),
    "qwen3-tied": lambda: Qwen3Config(**_SHAPE, head_dim=16, tie_word_embeddings=True),
    "qwen3-biases-window": lambda: Qwen3Config(
        **_SHAPE,
        head_dim=16,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=[FULL, SLIDING, FULL, SLIDING],
    ),
    "smollm3": lambda: SmolLM3Config(**_SHAPE),
    "smollm3-listed": lambda: SmolLM3Config(**_SHAPE, no_rope_layers=[1, 0, 0, 1], tie_word_embeddings=False),
    "smollm3-window": lambda: SmolLM3Config(
        **_SHAPE,
        no_rope_layer_interval=2,
        use_sliding_window=True,
        sliding_window=7,
        attention_bias=True,
        mlp_bias=True,
    ),
}
# Those that a GGUF file can hold.
GGUF_VARIANTS = (
    "llama",
    "llama-tied",
    "llama-head-dim",
    "llama-biases",
    "llama-rope-llama3",
    "llama-rope-linear",
    "qwen2",
    "qwen2-tied-rope-yarn",
    "qwen3",
    "qwen3-tied",
    "smollm3",
)


def random_model(variant: str, *, seed: int = 0) -> PreTrainedModel:
    """A model of the variant whose weights are large enough that every part of it shows in the logits."""
    model = AutoModelForCausalLM.from_config(VARIANTS[variant](), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * drawn if "norm" in name else 0.1 * drawn)
    return model.eval()


def save_base(variant: str, folder: Path, *, seed: int = 0) -> PreTrainedModel:
    """Save a random model in transformers' layout, with a tokenizer; returns the model."""
    model = random_model(variant, seed=seed)
    model.save_pretrained(folder)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    return model


def tiny_tokenizer() -> Tokenizer:
    """A byte-level tokenizer of exactly VOCAB tokens: bytes, some merges, three control tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<unk>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the house at the lake is the house that they saw then and there, when the others were at home"
    tokenizer.train_from_iterator([text, "weather together another whether leather"] * 3, trainer)
    assert tokenizer.get_vocab_size() == VOCAB
    return tokenizer


# ---- GGUF ------------------------------------------------------------------------------------------------------------

_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor of transformers."""
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{_GGUF_NAMES[rest]}.{kind}"
    return f"{_GGUF_NAMES[stem]}.{kind}"


def add_byte_level(writer: gguf.GGUFWriter, pre: str = "gpt-2") -> None:
    """The metadata of the tiny byte-level tokenizer; `pre` names how text is cut before merging."""
    tokenizer = tiny_tokenizer()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([tokenizer.id_to_token(i) or "" for i in range(VOCAB)])
    writer.add_token_types([3 if i < 3 else 1 for i in range(VOCAB)])
    writer.add_token_merges([f"{left} {right}" for left, right in json_merges(tokenizer)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
    writer.add_chat_template(template)


def add_sentencepiece(writer: gguf.GGUFWriter) -> None:
    """The metadata of a tokenizer in the manner of Llama 2: pieces with scores, bytes for what has no piece."""
    letters = ["▁", *"thealkounswrimy"]
    pieces = ["th", "he", "the", "▁t", "▁the", "an", "▁a", "in", "re", "ou", "▁th", "er", "▁w"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *pieces]
    assert len(tokens) == VOCAB
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (VOCAB - 259)])
    scores = [-float(pieces.index(token)) if token in pieces else -1000.0 for token in tokens]
    writer.add_token_scores(scores)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def json_merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """The merges of a byte-pair tokenizer, which only its JSON shows."""
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    tokenizer: Callable[[gguf.GGUFWriter], None] = add_byte_level,
    extra: Callable[[gguf.GGUFWriter], None] | None = None,
) -> None:
    """Write a model as llama.cpp's converter would; matrices in `kind`, vectors in F32. The model takes on the
    rounded matrices, so that it stays the reference. tokenizer, extra: add metadata.
    """
    config = model.config
    arch = config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = model.model.layers[0].self_attn.head_dim
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    _add_rope(writer, config, head_dim)
    tokenizer(writer)
    if extra is not None:
        extra(writer)
    _add_tensors(writer, model, kind, interleaved=arch in ("llama", "smollm3"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_rope(writer: gguf.GGUFWriter, config: PreTrainedConfig, head_dim: int) -> None:
    rope = config.rope_parameters
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        # llama.cpp stores by what each frequency is divided.
        plain = 1.0 / (rope["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim))
        turns = rope["original_max_position_embeddings"] * plain / (2 * np.pi)
        blend = np.clip((turns - 1.0) / (4.0 - 1.0), 0, 1)
        writer.add_tensor("rope_freqs.weight", (1 / ((1 - blend) / rope["factor"] + blend)).astype(np.float32))


def _add_tensors(
    writer: gguf.GGUFWriter, model: PreTrainedModel, kind: gguf.GGMLQuantizationType, *, interleaved: bool
) -> None:
    config = model.config
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            array = parameter.numpy()
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
                name.split(".")[-2]
            )
            if interleaved and heads is not None:
                halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
                array = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
            if array.ndim == 1 or kind is gguf.GGMLQuantizationType.F32:
                writer.add_tensor(gguf_name(name), array.copy())
                continue
            packed = quantize(array, kind)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=kind)
            rounded = dequantize(packed, kind).astype(np.float32)
            if interleaved and heads is not None:
                pairs = rounded.reshape(heads, rounded.shape[0] // heads // 2, 2, *rounded.shape[1:])
                rounded = pairs.swapaxes(1, 2).reshape(rounded.shape)
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(rounded)))
