"""The tensors of a GGUF base under their names and in their row order of transformers, streamed into safetensors.

Quantised tensors become fp32, exactly as ggml dequantises them; F16 and BF16 keep their type. One tensor is in memory
at a time. Shape legend: H heads, E head dimension. This module does not know configs or tokenizers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray

from tenon.bases.facts import ModelFacts
from tenon.bases.gguf_facts import ROPE_FREQS
from tenon.bases.gguf_header import GgufHeader, GgufTensor
from tenon.errors import BaseModelError

OnProgress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<module>\w+)\.(?P<kind>weight|bias)")
# What each GGUF type is stored as: (safetensors dtype, bytes of an element).
_KEPT = {"F16": ("F16", 2), "BF16": ("BF16", 2)}
_DEQUANTISED = ("F32", 4)


def transformers_name(name: str) -> str:
    """The name in transformers' checkpoints of a GGUF tensor. Raises BaseModelError base-tensor-unexpected."""
    match = _NAME.fullmatch(name)
    if match is not None:
        table = _TOP if match["layer"] is None else _LAYER
        if match["module"] in table:
            prefix = "" if match["layer"] is None else f"model.layers.{int(match['layer'])}."
            return f"{prefix}{table[match['module']]}.{match['kind']}"
    raise BaseModelError(
        "base-tensor-unexpected",
        f"the GGUF file holds a tensor that Tenon has no place for: {name}",
        hint="use a GGUF file of the plain model (no vision tower, no draft head)",
    )


def stored_bytes(header: GgufHeader) -> int:
    """How large the safetensors file will be, its header aside."""
    return sum(_stored(tensor)[1] for tensor in _wanted(header))


def write_weights(
    header: GgufHeader, facts: ModelFacts, path: Path, *, interleaved: bool, on_progress: OnProgress | None = None
) -> None:
    """Write all tensors as one safetensors file.

    interleaved: q and k rows lie pair by pair (llama.cpp's order for Llama) and are put back half by half.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    total_bytes = 0
    for tensor in _wanted(header):
        dtype, size_bytes = _stored(tensor)
        span = [total_bytes, total_bytes + size_bytes]
        entries[transformers_name(tensor.name)] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": span}
        total_bytes += size_bytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    done_bytes = 0
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in _wanted(header):
            array = _decode(header.path, tensor)
            if interleaved:
                array = _half_by_half(array, tensor.name, facts)
            done_bytes += file.write(np.ascontiguousarray(array).data)
            if on_progress is not None:
                on_progress(done_bytes, total_bytes)


def _wanted(header: GgufHeader) -> Iterator[GgufTensor]:
    # The frequency factors are in the facts already (gguf_facts).
    return (tensor for name, tensor in header.tensors.items() if name != ROPE_FREQS)


def _stored(tensor: GgufTensor) -> tuple[str, int]:
    dtype, element_bytes = _KEPT.get(tensor.type_name, _DEQUANTISED)
    return dtype, element_bytes * int(np.prod(tensor.shape))


def _decode(path: Path, tensor: GgufTensor) -> NDArray[np.generic]:
    """The tensor's numbers; F16 and BF16 as their raw 16 bits."""
    raw = np.memmap(path, dtype=np.uint8, mode="r", offset=tensor.begin, shape=(tensor.end - tensor.begin,))
    if tensor.type_name in _KEPT:
        return raw.view(np.uint16).reshape(tensor.shape)
    if tensor.type_name == "F32":
        return raw.view(np.float32).reshape(tensor.shape)
    rows = raw.reshape(*tensor.shape[:-1], -1)
    return dequantize(rows, gguf.GGMLQuantizationType(tensor.type_id)).reshape(tensor.shape)


def _half_by_half(array: NDArray[np.generic], name: str, facts: ModelFacts) -> NDArray[np.generic]:
    """Undo llama.cpp's order of q and k rows: in each head from (E/2, 2) to (2, E/2)."""
    module = name.split(".")[-2]
    if module not in ("attn_q", "attn_k"):
        return array
    heads = facts.heads if module == "attn_q" else facts.kv_heads
    pairs = array.reshape(heads, facts.head_dim // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
