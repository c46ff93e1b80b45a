"""From the header of a GGUF file to the facts of the base: the metadata of llama.cpp, read strictly.

Which biases, norms and heads there are is read off the table of tensors. This module decodes no tensor except
`rope_freqs`, the few numbers by which llama.cpp stores the frequency scaling of Llama 3.
"""

from __future__ import annotations

import math
import struct

from tenon.bases.facts import ModelFacts, RopeFacts
from tenon.bases.families import Family, family_of_gguf
from tenon.bases.gguf_header import GgufHeader
from tenon.errors import BaseModelError

ROPE_FREQS = "rope_freqs.weight"
# The only scaling of this kind that was ever trained: Llama 3.1 to 3.3, with the factor 8 or 32.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context_tokens": 8192}
_REFUSED = {
    "expert_count": "mixtures of experts are not done",
    "attention.sliding_window": "sliding windows of GGUF files are not done",
    "logit_scale": "scaled logits are not done",
    "attention.scale": "another attention scale is not done",
    "attn_logit_softcapping": "soft-capped scores are not done",
    "final_logit_softcapping": "soft-capped logits are not done",
    "embedding_scale": "scaled embeddings are not done",
    "residual_scale": "scaled residuals are not done",
}


def gguf_facts(header: GgufHeader) -> ModelFacts:
    """The facts of a GGUF base.

    Raises: BaseModelError base-damaged, base-unknown-architecture, base-unsupported.
    """
    arch = header.text("general.architecture", "nothing")
    family = family_of_gguf(arch, str(header.path))
    _refuse_features(header, arch)
    layers, heads = header.whole(f"{arch}.block_count"), header.whole(f"{arch}.attention.head_count")
    hidden = header.whole(f"{arch}.embedding_length")
    kv_heads = header.whole(f"{arch}.attention.head_count_kv", heads)
    head_dim = header.whole(f"{arch}.attention.key_length", hidden // heads)
    if heads % kv_heads or head_dim % 2:
        raise _unsupported(header, f"{arch}.attention.head_count_kv", "heads that cannot be shared out evenly")
    if f"blk.{layers - 1}.attn_norm.weight" not in header.tensors:
        raise _missing(header, f"blk.{layers - 1}.attn_norm.weight")
    qkv_bias, output_bias, mlp_bias = _biases(header, family)
    return ModelFacts(
        family=family.name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        feed_forward=header.whole(f"{arch}.feed_forward_length"),
        vocab=_vocab(header, hidden),
        context_tokens=header.whole(f"{arch}.context_length"),
        norm_eps=_single(header.number(f"{arch}.attention.layer_norm_rms_epsilon", 1e-6)),
        rope=_rope(header, arch, head_dim),
        tied_head="output.weight" not in header.tensors,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        qk_norm=family.qk_norm,
        # llama.cpp, too, takes the interval from the family: the file does not say it.
        rotary_layers=tuple((i + 1) % (family.no_rope_interval or layers + 1) != 0 for i in range(layers)),
        window_layers=(0,) * layers,
        bos_id=_token_id(header, "bos"),
        eos_ids=_stop_ids(header),
    )


def _refuse_features(header: GgufHeader, arch: str) -> None:
    for name, why in _REFUSED.items():
        if header.values.get(f"{arch}.{name}"):
            raise _unsupported(header, f"{arch}.{name}", why)
    if header.values.get("split.count", 1) != 1:
        raise BaseModelError(
            "base-unsupported",
            f"{header.path} is one part of a split GGUF file",
            got=f"{header.values['split.count']} parts",
            hint="join the parts first: llama-gguf-split --merge FIRST_PART.gguf WHOLE.gguf",
        )
    for key in (f"{arch}.attention.head_count", f"{arch}.attention.head_count_kv", f"{arch}.feed_forward_length"):
        if key in header.arrays:
            raise _unsupported(header, key, "layers of different sizes are not done")


def _biases(header: GgufHeader, family: Family) -> tuple[bool, bool, bool]:
    """(q, k and v; output; MLP): all or none of each group, as the family allows."""

    def group(*names: str) -> bool:
        found = [f"blk.0.{name}.bias" in header.tensors for name in names]
        if any(found) and not all(found):
            raise _unsupported(header, f"blk.0.{names[0]}.bias", "biases in some modules of a group are not done")
        return all(found)

    qkv, output, mlp = (
        group("attn_q", "attn_k", "attn_v"),
        group("attn_output"),
        group("ffn_gate", "ffn_up", "ffn_down"),
    )
    attention = (True, False) if family.qkv_bias else (output, output)
    if (qkv, output) != attention or (output and "attention_bias" not in family.bias_keys):
        raise _unsupported(header, "blk.0.attn_q.bias", f"the family {family.name} has no such set of biases")
    if mlp and "mlp_bias" not in family.bias_keys:
        raise _unsupported(header, "blk.0.ffn_gate.bias", f"the family {family.name} has no such biases")
    return qkv, output, mlp


def _vocab(header: GgufHeader, hidden: int) -> int:
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2 or embedding.shape[1] != hidden:
        raise _missing(header, "token_embd.weight")
    return embedding.shape[0]


def _rope(header: GgufHeader, arch: str, head_dim: int) -> RopeFacts:
    rotated = header.whole(f"{arch}.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise _unsupported(header, f"{arch}.rope.dimension_count", "heads that rotate in part only are not done")
    theta = _single(header.number(f"{arch}.rope.freq_base", 10_000.0))
    scaling = header.text(f"{arch}.rope.scaling.type", "none")
    factor = _single(header.number(f"{arch}.rope.scaling.factor", 1.0))
    if ROPE_FREQS in header.tensors:
        if scaling not in ("none", "llama3"):
            raise _unsupported(header, ROPE_FREQS, "frequency factors together with another scaling are not done")
        return _llama3_rope(header, theta, head_dim)
    if scaling == "none":
        return RopeFacts(theta=theta)
    if scaling == "linear":
        return RopeFacts(kind="linear", theta=theta, factor=factor)
    if scaling == "yarn":
        return _yarn_rope(header, arch, theta, factor)
    raise _unsupported(header, f"{arch}.rope.scaling.type", "this way of stretching positions is not done")


def _yarn_rope(header: GgufHeader, arch: str, theta: float, factor: float) -> RopeFacts:
    for name in ("attn_factor", "yarn_ext_factor", "yarn_attn_factor", "yarn_log_multiplier"):
        if f"{arch}.rope.scaling.{name}" in header.values:
            raise _unsupported(header, f"{arch}.rope.scaling.{name}", "Tenon does not know this rotary setting")
    return RopeFacts(
        kind="yarn",
        theta=theta,
        factor=factor,
        original_context_tokens=header.whole(f"{arch}.rope.scaling.original_context_length"),
        beta_fast=header.number(f"{arch}.rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=header.number(f"{arch}.rope.scaling.yarn_beta_slow", 1.0),
    )


def _llama3_rope(header: GgufHeader, theta: float, head_dim: int) -> RopeFacts:
    """The Llama 3 scaling whose divisors of the frequencies are those that the file stores, or a refusal."""
    tensor = header.tensors[ROPE_FREQS]
    if tensor.type_name != "F32" or tensor.shape != (head_dim // 2,):
        raise _unsupported(header, ROPE_FREQS, "it must be one F32 number for each pair of features")
    with header.path.open("rb") as file:
        file.seek(tensor.begin)
        stored = struct.unpack(f"<{head_dim // 2}f", file.read(tensor.end - tensor.begin))
    rope = RopeFacts(kind="llama3", theta=theta, factor=float(max(stored)), **_LLAMA3)
    wanted = _llama3_divisors(rope, head_dim)
    if any(abs(a - b) > 1e-4 * b for a, b in zip(stored, wanted, strict=True)):
        raise _unsupported(header, ROPE_FREQS, "these frequency factors are not those of Llama 3")
    return rope


def _llama3_divisors(rope: RopeFacts, head_dim: int) -> list[float]:
    """What each frequency is divided by: 1 for short waves, the factor for long ones, a blend of the two between."""
    divisors: list[float] = []
    for i in range(head_dim // 2):
        turns = rope.original_context_tokens / (2 * math.pi * rope.theta ** (2 * i / head_dim))
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = min(max(blend, 0.0), 1.0)
        divisors.append(1 / ((1 - blend) / rope.factor + blend))
    return divisors


def _token_id(header: GgufHeader, name: str) -> int | None:
    value = header.values.get(f"tokenizer.ggml.{name}_token_id")
    return value if isinstance(value, int) else None


def _stop_ids(header: GgufHeader) -> tuple[int, ...]:
    ids = [_token_id(header, name) for name in ("eos", "eot", "eom")]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _single(value: float) -> float:
    """The shortest decimal that a 32-bit float stands for: 9.999999747378752e-06 was written as 1e-05."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value


def _missing(header: GgufHeader, name: str) -> BaseModelError:
    return BaseModelError(
        "base-tensor-missing",
        f"{header.path} lacks the tensor {name}, or its shape is not the one that the metadata says",
        hint="download the file again",
    )


def _unsupported(header: GgufHeader, key: str, why: str) -> BaseModelError:
    got = header.values.get(key, "")
    return BaseModelError(
        "base-unsupported",
        f"{header.path}: {key}: {why}",
        got=str(got)[:80],
        hint="choose another base; running this one without it would give wrong results",
    )
