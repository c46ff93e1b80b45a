"""Checkpoints of bitsandbytes: put together module by module, kept bit for bit, refused by name where they differ."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tenon.errors import BaseModelError
from tenon.kernels import nf4
from tenon.kernels.nf4 import Nf4Weight
from tenon.models.bitsandbytes_files import group_modules
from tenon.models.frozen_formats import make_frozen

MODULE = "model.layers.0.self_attn.q_proj"
STATE = f"{MODULE}.weight.quant_state.bitsandbytes__nf4"


def parts(shape: tuple[int, int] = (96, 64), *, double: bool = True) -> dict[str, Tensor]:
    """The tensors of one module as bitsandbytes names them."""
    torch.manual_seed(0)
    quantised = nf4.quantise(torch.randn(shape) * 0.02, nested=double)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)}
    tensors = {"": quantised.packed_N[:, None], ".absmax": quantised.absmax_B, ".quant_map": quantised.levels_16}
    if quantised.nested is not None:
        offset = quantised.nested.offset.item()
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        tensors[".nested_absmax"] = quantised.nested.absmax_C
        tensors[".nested_quant_map"] = quantised.nested.map_256
    packed_state = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {f"{MODULE}.weight{part}": tensor for part, tensor in tensors.items()} | {STATE: packed_state}


def rewritten(tensors: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    """With other values in the state."""
    state = json.loads(bytes(tensors[STATE].tolist())) | changes
    return tensors | {STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("backwards", [True, False])
def test_modules_are_put_together_whatever_the_order(double: bool, backwards: bool) -> None:
    others = {"model.norm.weight": torch.ones(64), "lm_head.weight": torch.ones(7, 64)}
    tensors = list((parts(double=double) | others).items())
    found = dict(group_modules(reversed(tensors) if backwards else tensors))
    assert sorted(found) == ["lm_head.weight", f"{MODULE}.weight", "model.norm.weight"]
    module = found[f"{MODULE}.weight"]
    assert isinstance(module, Nf4Weight) and module.shape == (96, 64)
    torch.manual_seed(0)
    wanted = nf4.dequantise_reference(nf4.quantise(torch.randn(96, 64) * 0.02, nested=double))
    assert torch.equal(nf4.dequantise_reference(module), wanted)


def test_codes_stored_in_another_dtype() -> None:
    tensors = parts()
    tensors[f"{MODULE}.weight"] = tensors[f"{MODULE}.weight"].view(-1).view(torch.bfloat16)[:, None]
    (module,) = dict(group_modules(tensors.items())).values()
    (plain,) = dict(group_modules(parts().items())).values()
    assert isinstance(module, Nf4Weight) and isinstance(plain, Nf4Weight)
    assert torch.equal(module.packed_N, plain.packed_N)


def test_a_checkpoint_of_bitsandbytes_itself(tmp_path: Path) -> None:
    """Written by bitsandbytes, read here, kept in a map: the same bytes, the same weight."""
    bnb = pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes", exc_type=ImportError
    )
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(
        128, 48, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4"
    )
    layer.weight.data = (torch.randn(48, 128) * 0.02).bfloat16()
    layer = layer.to("cpu")
    packed = layer.weight
    saved = {f"{MODULE}.{name}": tensor.contiguous() for name, tensor in layer.state_dict().items()}
    save_file(saved, tmp_path / "model.safetensors")
    found = dict(group_modules(load_file(tmp_path / "model.safetensors").items()))
    assert list(found) == [f"{MODULE}.weight"]
    linear = make_frozen("nf4", 48, 128, bias=False, dtype=torch.bfloat16, device=torch.device("cpu"))
    linear.put(0, found[f"{MODULE}.weight"])
    assert torch.equal(linear.dense(0, 48), bnb.functional.dequantize_4bit(packed.data, packed.quant_state))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: rewritten(t, blocksize=128), "its blocksize is 128"),
        (lambda t: rewritten(t, nested_blocksize=64), "its nested_blocksize is 64"),
        (lambda t: rewritten(t, shape=[96, 65]), "sizes of a weight 96 x 65"),
        (lambda t: rewritten(t, shape=[6144]), r"its shape is \[6144\]"),
        (lambda t: rewritten(t, nested_offset=None), "nested absmax"),
        (lambda t: t | {STATE: torch.zeros(4, dtype=torch.uint8)}, "no JSON"),
        (lambda t: t | {f"{MODULE}.weight.quant_map": torch.linspace(-1, 1, 16)}, "levels"),
        (lambda t: {f"{MODULE}.weight.quant_state.bitsandbytes__fp4": t[STATE]}, "quantised to fp4"),
        (lambda t: {f"{MODULE}.SCB": torch.ones(96)}, "LLM.int8"),
    ],
)
def test_what_cannot_be_read_is_named(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], told: str) -> None:
    with pytest.raises(BaseModelError, match=told) as caught:
        list(group_modules(change(parts()).items()))
    assert caught.value.code == "base-quantised-format" and MODULE in caught.value.what


@pytest.mark.parametrize("part", ["absmax", "quant_map", "nested_absmax", "quant_state.bitsandbytes__nf4"])
def test_a_part_that_is_missing_is_named(part: str) -> None:
    tensors = parts()
    del tensors[f"{MODULE}.weight.{part}"]
    with pytest.raises(BaseModelError, match=f"{MODULE} lacks {part}") as caught:
        list(group_modules(tensors.items()))
    assert caught.value.code == "base-quantised-incomplete"
