"""Weights that bitsandbytes quantised to nf4, as they lie in safetensors files: several tensors a module, put together.

    NAME.weight                               packed codes, two a byte, in a column of bytes (or of any wider dtype)
    NAME.weight.absmax                        codes of the absmax (uint8), or the absmax themselves (fp32)
    NAME.weight.quant_map                     the 16 levels
    NAME.weight.nested_absmax                 where the absmax are codes: the absmax of their blocks,
    NAME.weight.nested_quant_map              and their map of 256 values
    NAME.weight.quant_state.bitsandbytes__nf4 JSON as bytes: block sizes, the shape, the offset of the absmax

The parts may come in any order, from several files. This module does not know which modules there must be.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from tenon.errors import BaseModelError
from tenon.kernels.nf4 import BLOCK, NESTED_BLOCK, NestedAbsmax, Nf4Weight, levels

_STATE = "quant_state.bitsandbytes__nf4"
_PLAIN = ("weight", "absmax", "quant_map", _STATE)
_NESTED = (*_PLAIN, "nested_absmax", "nested_quant_map")
# Parts of the formats that look alike and are not read.
_FOREIGN = {"quant_state.bitsandbytes__fp4": "fp4", "SCB": "LLM.int8", "weight_format": "LLM.int8"}


def group_modules(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor | Nf4Weight]]:
    """Named tensors, with those of each quantised module put together under the name of its weight.

    All others pass through, as they come. The tensors of a quantised weight lie where they lay.
    Raises BaseModelError base-quantised-format, base-quantised-incomplete, naming the module.
    """
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        module, part = _split(name, tensor)
        if not part:
            yield name, tensor
            continue
        parts = waiting.setdefault(module, {})
        parts[part] = tensor
        if _complete(parts):
            yield f"{module}.weight", _weight(module, waiting.pop(module))
    if waiting:
        module, parts = min(waiting.items())
        missing = [part for part in (_NESTED if _is_nested(parts) else _PLAIN) if part not in parts]
        raise BaseModelError(
            "base-quantised-incomplete",
            f"the quantised weight of {module} lacks {', '.join(missing)}",
            got=", ".join(sorted(parts)),
            hint="the download is incomplete; download the base again",
        )


def _split(name: str, tensor: Tensor) -> tuple[str, str]:
    """(module, part) of a tensor of a quantised module; (name, "") of any other."""
    module, separator, part = name.rpartition(".weight.")
    if separator and (part in _NESTED or part in _FOREIGN):
        if part in _FOREIGN:
            raise _unread(module, f"it is quantised to {_FOREIGN[part]}, and only nf4 is read")
        return module, part
    module, separator, part = name.rpartition(".")
    if separator and part in _FOREIGN:
        raise _unread(module, f"it is quantised to {_FOREIGN[part]}, and only nf4 is read")
    # Packed codes are one column; no weight of a decoder is.
    if separator and part == "weight" and tensor.ndim == 2 and tensor.shape[1] == 1:
        return module, part
    return name, ""


def _is_nested(parts: dict[str, Tensor]) -> bool:
    return "absmax" in parts and parts["absmax"].dtype == torch.uint8


def _complete(parts: dict[str, Tensor]) -> bool:
    return all(part in parts for part in (_NESTED if _is_nested(parts) else _PLAIN))


def _weight(module: str, parts: dict[str, Tensor]) -> Nf4Weight:
    state = _read_state(module, parts[_STATE])
    nested = _is_nested(parts)
    packed_N, absmax_B = parts["weight"].reshape(-1).view(torch.uint8), parts["absmax"]
    table = levels(packed_N.device)
    if not torch.equal(parts["quant_map"].float(), table):
        raise _unread(module, "its levels are not those of nf4")
    wanted = {"blocksize": BLOCK} | ({"nested_blocksize": NESTED_BLOCK} if nested else {})
    for key, size in wanted.items():
        if state.get(key) != size:
            raise _unread(module, f"its {key} is {state.get(key)}, and only {size} is read")
    outputs, inputs = _shape(module, state)
    blocks = -(-outputs * inputs // BLOCK)
    if packed_N.numel() != -(-outputs * inputs // 2) or absmax_B.numel() != blocks:
        raise _unread(module, f"its tensors do not have the sizes of a weight {outputs} x {inputs}")
    if not nested:
        return Nf4Weight((outputs, inputs), packed_N, absmax_B.float(), None, table)
    absmax_C, offset = parts["nested_absmax"], state.get("nested_offset")
    if absmax_C.numel() != -(-blocks // NESTED_BLOCK) or not isinstance(offset, int | float):
        raise _unread(module, "its nested absmax do not have the size, or not the offset, that they need")
    offset = torch.tensor(float(offset), dtype=torch.float32, device=packed_N.device)
    quantised = NestedAbsmax(parts["nested_quant_map"].float(), absmax_C.float(), offset)
    return Nf4Weight((outputs, inputs), packed_N, absmax_B, quantised, table)


def _read_state(module: str, state: Tensor) -> dict[str, Any]:
    try:
        tree = json.loads(bytes(state.tolist()))
    except ValueError as error:
        raise _unread(module, "its quant_state is no JSON") from error
    if not isinstance(tree, dict):
        raise _unread(module, "its quant_state is no JSON object")
    return tree


def _shape(module: str, state: dict[str, Any]) -> tuple[int, int]:
    match state.get("shape"):
        case [int(outputs), int(inputs)] if outputs > 0 and inputs > 0:
            return outputs, inputs
        case other:
            raise _unread(module, f"its shape is {other}")


def _unread(module: str, why: str) -> BaseModelError:
    return BaseModelError(
        "base-quantised-format",
        f"the quantised weight of {module} cannot be read: {why}",
        hint="choose the unquantised base, and precision.base=nf4 to keep it in 4 bits",
    )
