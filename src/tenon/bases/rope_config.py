"""Rotary settings of a config.json, in the spelling of transformers 5 (`rope_parameters`) and the one before.

Before: `rope_theta` beside `rope_scaling: {type or rope_type, factor, …}`. Now: all of it in `rope_parameters`.
Where both are there, `rope_scaling` wins, as in transformers. This module computes no frequency.
"""

from __future__ import annotations

from typing import Any, Literal, cast

from tenon.bases.config_reader import ConfigReader
from tenon.bases.facts import RopeFacts

_KINDS = ("default", "linear", "llama3", "yarn")
# Known keys; one that a kind does not use is no harm, an unknown one could change the result.
_KNOWN = frozenset(
    {
        "rope_type",
        "type",
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "partial_rotary_factor",
        "finetuned",
    }
)


def read_rope(config: ConfigReader, *, theta: float, context_tokens: int) -> RopeFacts:
    """Rotary facts of a config. theta: the family's base frequency where the config names none.

    Raises: BaseModelError base-config, base-unsupported (another kind, partial rotation, an unknown key).
    """
    tree: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        value = config.tree.get(key)
        if value is not None and not isinstance(value, dict):
            raise config.wrong(key, "an object")
        tree = value or tree
    rope = ConfigReader(tree, f"{config.where}: rope_parameters")
    _refuse_unknown(rope)
    for reader in (config, rope):
        if reader.number("partial_rotary_factor", 1.0) != 1.0:
            raise reader.unsupported("partial_rotary_factor", "heads that rotate in part only are not done")
    kind = _kind(rope)
    theta = rope.number("rope_theta", config.number("rope_theta", theta))
    if kind == "default":
        return RopeFacts(kind=kind, theta=theta)
    if kind == "linear":
        return RopeFacts(kind=kind, theta=theta, factor=rope.number("factor"))
    original = config.tree.get("original_max_position_embeddings")
    original_tokens = (config if original is not None else rope).whole(
        "original_max_position_embeddings", context_tokens
    )
    if kind == "llama3":
        return RopeFacts(
            kind=kind,
            theta=theta,
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_context_tokens=original_tokens,
        )
    return RopeFacts(
        kind=kind,
        theta=theta,
        factor=rope.number("factor", context_tokens / original_tokens),
        original_context_tokens=original_tokens,
        beta_fast=rope.number("beta_fast", 32.0) or 32.0,
        beta_slow=rope.number("beta_slow", 1.0) or 1.0,
        attention_factor=rope.number_or_none("attention_factor"),
        mscale=rope.number_or_none("mscale"),
        mscale_all_dim=rope.number_or_none("mscale_all_dim"),
        truncate=rope.flag("truncate", True),
    )


def rope_tree(rope: RopeFacts) -> dict[str, object]:
    """The `rope_parameters` of transformers 5 that say the same: inverse of `read_rope`."""
    tree: dict[str, object] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        tree["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn"):
        tree["original_max_position_embeddings"] = rope.original_context_tokens
    if rope.kind == "llama3":
        tree |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        optional = {key: rope.model_dump()[key] for key in ("attention_factor", "mscale", "mscale_all_dim")}
        tree |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        tree |= {key: value for key, value in optional.items() if value is not None}
    return tree


def _kind(rope: ConfigReader) -> Literal["default", "linear", "llama3", "yarn"]:
    key = "rope_type" if "rope_type" in rope.tree else "type"
    kind = rope.tree.get(key, "default")
    if kind not in _KINDS:
        raise rope.unsupported(key, f"this way of stretching positions is not done (done are {', '.join(_KINDS)})")
    return cast('Literal["default", "linear", "llama3", "yarn"]', kind)


def _refuse_unknown(rope: ConfigReader) -> None:
    for key in rope.tree:
        if key not in _KNOWN:
            raise rope.unsupported(key, "Tenon does not know this rotary setting")
