"""A decoder's weights by the names that transformers gives them: where each goes when it is loaded, and how it reads.

Loading is strict: each tensor exactly once, with its shape. A module inside a stacked weight is quantised as it comes,
alone. This module does not know files, nor what the weights are for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from tenon.bases.facts import MODULE_PATHS, STACKS, ModelFacts
from tenon.errors import BaseModelError
from tenon.kernels.nf4 import Nf4Weight
from tenon.models.frozen import FrozenLinear, as_tensor
from tenon.models.layer import Layer


@dataclass(frozen=True, slots=True)
class Place:
    """Where one named tensor lives: its shape, how it is set, and how it reads (a view where nothing is quantised)."""

    shape: tuple[int, ...]
    put: Callable[[Tensor | Nf4Weight], object]
    get: Callable[[], Tensor]


def tensor_place(tensor: Tensor) -> Place:
    """The place of a tensor that is kept as it comes."""
    return Place(tuple(tensor.shape), lambda given: tensor.copy_(as_tensor(given, tensor.device)), lambda: tensor)


def layer_places(layer: Layer, facts: ModelFacts) -> dict[str, Place]:
    """The places of one layer's tensors by their names inside the layer."""
    places = {
        "input_layernorm.weight": tensor_place(layer.input_norm_D),
        "post_attention_layernorm.weight": tensor_place(layer.post_norm_D),
    }
    heads = layer.heads
    if heads.q_norm_E is not None and heads.k_norm_E is not None:
        places["self_attn.q_norm.weight"] = tensor_place(heads.q_norm_E)
        places["self_attn.k_norm.weight"] = tensor_place(heads.k_norm_E)
    for stack, modules in STACKS.items():
        linear, start = layer.stacks[stack], 0
        for module in modules:
            outputs, inputs = facts.linear_shape(module)
            places[f"{MODULE_PATHS[module]}.weight"] = _module_place(linear, start, outputs, inputs)
            if linear.bias_O is not None:
                places[f"{MODULE_PATHS[module]}.bias"] = tensor_place(linear.bias_O[start : start + outputs])
            start += outputs
    return places


def _module_place(linear: FrozenLinear, start: int, outputs: int, inputs: int) -> Place:
    return Place(
        (outputs, inputs), lambda weight: linear.put(start, weight), lambda: linear.dense(start, start + outputs)
    )


def load_tensors(
    places: Mapping[str, Place],
    tensors: Iterable[tuple[str, Tensor | Nf4Weight]],
    *,
    ignored: Callable[[str], bool],
    family: str,
) -> None:
    """Put every tensor into its place, strictly.

    Raises BaseModelError base-tensor-unexpected, base-tensor-shape or base-tensor-missing, naming the tensor.
    """
    wanted = dict(places)
    for name, tensor in tensors:
        if ignored(name):
            continue
        place = wanted.pop(name, None)
        if place is None:
            raise BaseModelError(
                "base-tensor-unexpected",
                f"the base holds a tensor that its architecture ({family}) does not have: {name}",
                hint="the files and config.json do not belong together; download the base again",
            )
        if place.shape != tuple(tensor.shape):
            raise BaseModelError(
                "base-tensor-shape",
                f"tensor {name} does not have the shape that config.json asks for, {list(place.shape)}",
                got=str(list(tensor.shape)),
                hint="the files and config.json do not belong together; download the base again",
            )
        place.put(tensor)
    if wanted:
        names = sorted(wanted)
        raise BaseModelError(
            "base-tensor-missing",
            f"the base lacks {len(names)} of its tensors, the first is {names[0]}",
            hint="the download is incomplete; download the base again",
        )
