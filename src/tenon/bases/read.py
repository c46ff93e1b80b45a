"""From a base's files to its facts: config.json and generation_config.json of a folder, or the header of a GGUF file.

What a known family's config asks for and the decoder does not do is refused by name, never ignored. This module decodes
no tensor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tenon.bases.config_reader import ConfigReader
from tenon.bases.facts import ModelFacts
from tenon.bases.families import Family, family_of
from tenon.bases.gguf_facts import gguf_facts
from tenon.bases.gguf_header import read_gguf
from tenon.bases.locate import BaseLocation
from tenon.bases.rope_config import read_rope
from tenon.errors import BaseModelError

# Keys that, when they say anything but null, false, 0 or an empty list, change what the model computes.
_REFUSED = {
    "auto_map": "the base brings its own code, which Tenon does not run",
    "num_experts": "mixtures of experts are not done",
    "num_local_experts": "mixtures of experts are not done",
    "n_routed_experts": "mixtures of experts are not done",
    "attention_chunk_size": "chunked attention is not done",
    "attn_logit_softcapping": "soft-capped scores are not done",
    "final_logit_softcapping": "soft-capped logits are not done",
    "logit_scale": "scaled logits are not done",
    "logits_scaling": "scaled logits are not done",
    "embedding_multiplier": "scaled embeddings are not done",
    "residual_multiplier": "scaled residuals are not done",
    "attention_multiplier": "another attention scale is not done",
    "vision_config": "models that see are not done",
    "is_encoder_decoder": "encoders are not done",
    "add_cross_attention": "cross-attention is not done",
}
_BIAS_KEYS = ("attention_bias", "mlp_bias")


def read_facts(location: BaseLocation) -> ModelFacts:
    """The facts of a located base.

    Raises: BaseModelError base-config, base-unknown-architecture, base-unsupported, base-damaged.
    """
    if location.kind == "gguf":
        return gguf_facts(read_gguf(location.path))
    return folder_facts(location.path)


def folder_facts(folder: Path) -> ModelFacts:
    """The facts of a folder in Hugging Face's layout."""
    path = folder / "config.json"
    if not path.is_file():
        raise BaseModelError(
            "base-not-a-model",
            f"{folder} is no model: it has no config.json",
            hint="give a folder with config.json and *.safetensors, or a .gguf file",
        )
    config = ConfigReader.open(path)
    family = family_of(str(config.tree.get("model_type", "nothing")), config.where)
    _refuse_features(config, family)
    heads, hidden = config.whole("num_attention_heads"), config.whole("hidden_size")
    layers, context_tokens = config.whole("num_hidden_layers"), config.whole("max_position_embeddings")
    # A key that is null means "as many as heads"; a key that is missing means the family's own default.
    kv_default = heads if "num_key_value_heads" in config.tree else (family.kv_heads or heads)
    attention_bias = config.flag("attention_bias", False) and "attention_bias" in family.bias_keys
    rotary = _rotary_layers(config, family, layers)
    bos_id, eos_ids = _stop_ids(folder, config)
    facts = ModelFacts(
        family=family.name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=config.whole("num_key_value_heads", kv_default),
        head_dim=config.whole("head_dim", family.head_dim or hidden // heads),
        feed_forward=config.whole("intermediate_size"),
        vocab=config.whole("vocab_size"),
        context_tokens=context_tokens,
        norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=read_rope(config, theta=family.theta, context_tokens=context_tokens),
        tied_head=config.flag("tie_word_embeddings", family.tied),
        qkv_bias=family.qkv_bias or attention_bias,
        output_bias=attention_bias,
        mlp_bias=config.flag("mlp_bias", False),
        qk_norm=family.qk_norm,
        rotary_layers=rotary,
        window_layers=_window_layers(config, family, rotary),
        bos_id=bos_id,
        eos_ids=eos_ids,
        stored=_stored(config),
    )
    if facts.heads % facts.kv_heads or facts.head_dim % 2:
        raise config.wrong("num_key_value_heads", "a divisor of num_attention_heads, with an even head_dim")
    return facts


def _stored(config: ConfigReader) -> Literal["plain", "nf4"]:
    """Of weights that are quantised already, only bitsandbytes' nf4 is read."""
    quantised = config.tree.get("quantization_config")
    if not quantised:
        return "plain"
    if not isinstance(quantised, dict) or quantised.get("quant_method") != "bitsandbytes":
        raise config.unsupported("quantization_config", "of quantised weights only bitsandbytes' nf4 is read")
    if not quantised.get("load_in_4bit") or quantised.get("bnb_4bit_quant_type") != "nf4":
        raise config.unsupported("quantization_config", "of bitsandbytes' formats only nf4 is read")
    return "nf4"


def _refuse_features(config: ConfigReader, family: Family) -> None:
    for key, why in _REFUSED.items():
        if config.tree.get(key):
            raise config.unsupported(key, why)
    architectures = config.tree.get("architectures")
    if architectures and family.architecture not in architectures:
        raise config.unsupported("architectures", f"of this family only {family.architecture} is done")
    if config.tree.get("hidden_act", "silu") not in ("silu", "swish"):
        raise config.unsupported("hidden_act", "only silu is done")
    for key in _BIAS_KEYS:
        meaningless = key == "attention_bias" and family.qkv_bias  # q, k and v have one whatever the key says
        if key not in family.bias_keys and config.flag(key, False) and not meaningless:
            raise config.unsupported(key, f"the family {family.name} has no such biases")
    if family.windows == "never" and config.tree.get("sliding_window"):
        raise config.unsupported("sliding_window", f"the family {family.name} has no sliding windows")
    if not family.no_rope_interval and config.tree.get("no_rope_layers"):
        raise config.unsupported("no_rope_layers", f"the family {family.name} rotates in every layer")


def _rotary_layers(config: ConfigReader, family: Family, layers: int) -> tuple[bool, ...]:
    if not family.no_rope_interval:
        return (True,) * layers
    flags = config.tree.get("no_rope_layers")
    if flags is None:
        interval = config.whole("no_rope_layer_interval", family.no_rope_interval)
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    # In spite of the name, 1 means that the layer rotates.
    if not isinstance(flags, list) or len(flags) < layers or any(flag not in (0, 1) for flag in flags):
        raise config.wrong("no_rope_layers", f"a list of 0 and 1, one for each of {layers} layers")
    return tuple(bool(flag) for flag in flags[:layers])


def _window_layers(config: ConfigReader, family: Family, rotary: tuple[bool, ...]) -> tuple[int, ...]:
    """Tokens that a query sees, itself included, per layer; 0: all before it."""
    layers = len(rotary)
    if "sliding_window" in config.tree:
        tokens = config.whole("sliding_window") if config.tree["sliding_window"] else 0
    else:
        tokens = family.window_tokens or 0
    if family.windows in ("never", "every"):
        if set(config.tree.get("layer_types") or ()) - {"sliding_attention" if tokens else "full_attention"}:
            raise config.unsupported("layer_types", "the layers of this family attend all alike")
        return (tokens,) * layers
    switched_on = config.flag("use_sliding_window", False) and tokens > 0
    named = config.tree.get("layer_types")
    if named is not None:
        return _named_windows(config, named, tokens if switched_on else 0, layers)
    if not switched_on:
        return (0,) * layers
    if family.windows == "unrotated":
        return tuple(0 if rotates else tokens for rotates in rotary)
    first = config.tree.get("max_window_layers")
    first = 28 if first is None else first  # the default of the Qwen configs
    return tuple(tokens if layer >= first else 0 for layer in range(layers))


def _named_windows(config: ConfigReader, named: object, tokens: int, layers: int) -> tuple[int, ...]:
    if not isinstance(named, list) or len(named) != layers:
        raise config.wrong("layer_types", f"a list of {layers} names, one for each layer")
    for name in named:
        if name not in ("full_attention", "sliding_attention"):
            raise config.unsupported("layer_types", "only full_attention and sliding_attention are done")
        if name == "sliding_attention" and not tokens:
            raise config.unsupported("layer_types", "a sliding layer, but use_sliding_window or sliding_window is off")
    return tuple(tokens if name == "sliding_attention" else 0 for name in named)


def _stop_ids(folder: Path, config: ConfigReader) -> tuple[int | None, tuple[int, ...]]:
    """bos and eos ids: generation_config.json where it says them, else config.json."""
    path = folder / "generation_config.json"
    readers = [ConfigReader.open(path), config] if path.is_file() else [config]
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    for reader in reversed(readers):
        bos = reader.tree.get("bos_token_id")
        eos = reader.tree.get("eos_token_id")
        ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        if not all(isinstance(i, int) for i in ids) or not isinstance(bos, int | None):
            raise reader.wrong("eos_token_id", "a token id or a list of them (and bos_token_id a token id)")
        bos_id, eos_ids = (bos_id if bos is None else bos), (ids or eos_ids)
    return bos_id, eos_ids
