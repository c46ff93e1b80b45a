"""config.json and generation_config.json for a base that came without: the facts, spelled as transformers reads them.

This module is the inverse of `bases.read`: reading what it writes gives the same facts.
"""

from __future__ import annotations

from tenon.bases.facts import ModelFacts
from tenon.bases.families import family_of
from tenon.bases.rope_config import rope_tree


def config_tree(facts: ModelFacts) -> dict[str, object]:
    """The config.json of a base without sliding windows."""
    family = family_of(facts.family, "facts")
    tree: dict[str, object] = {
        "architectures": [family.architecture],
        "model_type": facts.family,
        "dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": facts.hidden,
        "intermediate_size": facts.feed_forward,
        "num_hidden_layers": facts.layers,
        "num_attention_heads": facts.heads,
        "num_key_value_heads": facts.kv_heads,
        "head_dim": facts.head_dim,
        "max_position_embeddings": facts.context_tokens,
        "rms_norm_eps": facts.norm_eps,
        "vocab_size": facts.vocab,
        "tie_word_embeddings": facts.tied_head,
        "rope_parameters": rope_tree(facts.rope),
        **_ids(facts),
    }
    switches = {"attention_bias": facts.output_bias, "mlp_bias": facts.mlp_bias}
    tree |= {key: value for key, value in switches.items() if key in family.bias_keys}
    if family.windows != "never":
        tree |= {"sliding_window": None, "use_sliding_window": False}
    if family.no_rope_interval:
        tree["no_rope_layers"] = [int(rotates) for rotates in facts.rotary_layers]
    return tree


def generation_tree(facts: ModelFacts) -> dict[str, object]:
    """The generation_config.json: the ids that begin and end a text."""
    return _ids(facts)


def _ids(facts: ModelFacts) -> dict[str, object]:
    eos: object = facts.eos_ids[0] if len(facts.eos_ids) == 1 else list(facts.eos_ids) or None
    return {"bos_token_id": facts.bos_id, "eos_token_id": eos}
