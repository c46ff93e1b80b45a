"""Adapter files in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`, out and in, strictly.

What is written loads in PEFT and in vLLM; what is read must be complete, of the right shapes, finite, and free of
features that Tenon would have to ignore (DoRA, trained biases, whole saved modules).

Shape legend: D inputs, O outputs, R rank. This module does not know training, registries or bases.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tenon.adapters.bank import AdapterBank, SiteShape, Slot, SlotShape
from tenon.bases.facts import MODULE_PATHS, parse_site
from tenon.errors import AdapterError

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model.model."
_TENSOR_NAME = re.compile(r"base_model\.model\.model\.(layers\.\d+\.\w+\.(\w+))\.lora_([AB])\.weight")
# Features of PEFT's LoRA that change what an adapter computes and that Tenon does not run: (key, values that are fine).
_REFUSED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("use_dora", (False, None)),
    ("bias", ("none", None)),
    ("lora_bias", (False, None)),
    ("fan_in_fan_out", (False, None)),
    ("modules_to_save", ((), [], None)),
    ("target_parameters", ((), [], None)),
    ("trainable_token_indices", ((), [], {}, None)),
    ("alora_invocation_tokens", ((), [], None)),
    ("layer_replication", ((), [], None)),
)


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter read from disk: its shape, its fp32 matrices by site, and its config as it was."""

    shape: SlotShape
    matrices: dict[str, tuple[Tensor, Tensor]]
    config: dict[str, Any]


def write_adapter(folder: Path, slot: Slot, *, base: str, rslora: bool = False) -> None:
    """Write a slot as PEFT files into an existing folder. base: name or path that PEFT would load the base from.

    Raises AdapterError adapter-not-finite rather than write NaN or infinity.
    """
    if not bool(torch.isfinite(slot.parameters_P).all()):
        raise AdapterError(
            "adapter-not-finite",
            f"adapter {slot.name} holds NaN or infinite weights, so it was not written",
            hint="resume from the last good checkpoint with a lower optimizer.lr",
        )
    tensors = {}
    for site, (a_RD, b_OR) in slot.matrices().items():
        tensors[f"{_PREFIX}{site}.lora_A.weight"] = a_RD.cpu().contiguous()
        tensors[f"{_PREFIX}{site}.lora_B.weight"] = b_OR.cpu().contiguous()
    save_file(tensors, folder / TENSORS_NAME, metadata={"format": "pt"})
    config = adapter_config(slot.shape, base=base, rslora=rslora)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def adapter_config(shape: SlotShape, *, base: str, rslora: bool) -> dict[str, Any]:
    """PEFT's LoraConfig of a shape. Ranks that differ between sites become rank_pattern and alpha_pattern."""
    ranks = {site: s.rank for site, s in shape.sites.items()}
    alphas = {site: s.scale * (s.rank**0.5 if rslora else s.rank) for site, s in shape.sites.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": shape.dropout,
        "use_rslora": rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "rank_pattern": {site: r for site, r in ranks.items() if r != rank},
        "alpha_pattern": {site: _number(a) for site, a in alphas.items() if abs(a - alpha) > 1e-9},
    }
    return config | _targets(shape)


def _number(value: float) -> float | int:
    """Whole numbers as integers: some readers want them so."""
    return round(value) if abs(value - round(value)) < 1e-9 else value


def _targets(shape: SlotShape) -> dict[str, Any]:
    """target_modules, by module name where the layers allow it, else every site by its full name."""
    layers_of: dict[str, set[int]] = {}
    for site in shape.sites:
        layer, module = parse_site(site)
        layers_of.setdefault(module, set()).add(layer)
    first = next(iter(layers_of.values()))
    if any(layers != first for layers in layers_of.values()):
        return {"target_modules": [f"model.{site}" for site in shape.sites], "layers_to_transform": None}
    modules = [m for m in MODULE_PATHS if m in layers_of]
    layers = sorted(first)
    return {"target_modules": modules, "layers_to_transform": layers, "layers_pattern": "layers"}


def read_adapter(folder: Path) -> AdapterFiles:
    """Read PEFT files. Raises AdapterError adapter-missing, adapter-config, adapter-unsupported, adapter-tensors,
    adapter-not-finite, each naming the file and what is wrong.
    """
    config = _read_config(folder)
    tensors = _read_tensors(folder / TENSORS_NAME)
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR_NAME.fullmatch(name)
        if match is None or match[2] not in MODULE_PATHS:
            raise _tensor_error(folder, f"tensor {name} belongs to no linear module that Tenon adapts")
        pairs.setdefault(match[1], {})[match[3]] = tensor
    if not pairs:
        raise _tensor_error(folder, "there is no LoRA matrix in the file")
    sites: dict[str, SiteShape] = {}
    matrices: dict[str, tuple[Tensor, Tensor]] = {}
    for site, pair in pairs.items():
        sites[site] = _site_shape(folder, config, site, pair)
        matrices[site] = (pair["A"], pair["B"])
    _check_targets(folder, config, set(sites))
    dropout = float(config.get("lora_dropout") or 0.0)
    return AdapterFiles(SlotShape(sites, dropout), matrices, config)


def load_adapter(bank: AdapterBank, name: str, files: AdapterFiles, *, trained: bool = False) -> int:
    """Put an adapter that was read into a new slot of the bank; returns its number. Shapes are checked against the
    base.
    """
    number = bank.add(name, files.shape, trained=trained)
    try:
        fill_slot(bank.slots[number], files)
    except AdapterError:
        bank.remove(number)
        raise
    return number


def fill_slot(slot: Slot, files: AdapterFiles) -> None:
    """Copy matrices into a slot of the same sites and ranks. Raises AdapterError adapter-tensors."""
    wanted = slot.matrices()
    if set(wanted) != set(files.matrices):
        odd = sorted(set(wanted) ^ set(files.matrices))[0]
        raise AdapterError(
            "adapter-tensors",
            f"the adapter and the slot {slot.name} do not adapt the same matrices; the first that differs is {odd}",
            hint="use the recipe that the adapter was trained with",
        )
    for site, (a_RD, b_OR) in wanted.items():
        for letter, mine, theirs in (("A", a_RD, files.matrices[site][0]), ("B", b_OR, files.matrices[site][1])):
            if mine.shape != theirs.shape:
                raise AdapterError(
                    "adapter-tensors",
                    f"{site}.lora_{letter} does not fit the base, which wants {list(mine.shape)}",
                    got=str(list(theirs.shape)),
                    hint="the adapter belongs to another base; choose its own base",
                )
            mine.copy_(theirs)
    slot.refresh()


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise AdapterError(
            "adapter-missing",
            f"{folder} is no adapter: it has no {CONFIG_NAME}",
            hint="give a folder in PEFT's layout, or the name of a registered adapter: tenon adapters list",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(
            "adapter-config", f"{path} is no valid JSON", got=str(error), hint="copy it again"
        ) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or not isinstance(config.get("r"), int):
        raise AdapterError(
            "adapter-config",
            f"{path} does not describe a LoRA adapter",
            got=str(config.get("peft_type") if isinstance(config, dict) else type(config).__name__),
            hint="Tenon reads PEFT adapters of peft_type LORA",
        )
    for key, fine in _REFUSED:
        if config.get(key) not in fine:
            raise AdapterError(
                "adapter-unsupported",
                f"{path} asks for {key}, which would be lost here",
                got=str(config[key]),
                hint="merge the adapter with PEFT, or train it again without that feature",
            )
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise AdapterError(
            "adapter-missing",
            f"{path} is missing",
            hint="only safetensors are read; convert .bin files with PEFT first",
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError) as error:
        raise _tensor_error(path.parent, f"{path.name} cannot be read", got=str(error)) from error
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            raise _tensor_error(path.parent, f"tensor {name} is not of a floating type", got=str(tensor.dtype))
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(
                "adapter-not-finite",
                f"tensor {name} of {path} holds NaN or infinity",
                hint="take an earlier version of the adapter",
            )
    return {name: tensor.to(torch.float32) for name, tensor in tensors.items()}


def _site_shape(folder: Path, config: dict[str, Any], site: str, pair: dict[str, Tensor]) -> SiteShape:
    if set(pair) != {"A", "B"}:
        missing = "B" if "A" in pair else "A"
        raise _tensor_error(folder, f"{site} has no lora_{missing}")
    rank = int(_pattern(config.get("rank_pattern"), site, config["r"]))
    alpha = float(_pattern(config.get("alpha_pattern"), site, config.get("lora_alpha") or config["r"]))
    if pair["A"].ndim != 2 or pair["B"].ndim != 2 or pair["A"].shape[0] != rank or pair["B"].shape[1] != rank:
        shapes = f"A {list(pair['A'].shape)}, B {list(pair['B'].shape)}"
        raise _tensor_error(folder, f"the matrices of {site} are not of rank {rank}", got=shapes)
    return SiteShape(rank, alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _pattern(patterns: dict[str, Any] | None, site: str, default: Any) -> Any:
    """PEFT's rule: the first key that the end of the module's name matches, as a regular expression."""
    for key, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({key.removeprefix('^')})", f"model.{site}"):
            return value
    return default


def _check_targets(folder: Path, config: dict[str, Any], present: set[str]) -> None:
    """Every module that the config names must have its matrices in the file."""
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        return  # a pattern: which modules it means depends on the base
    for target in targets:
        if not any(f".model.{site}".endswith(f".{target}") for site in present):
            raise _tensor_error(folder, f"{CONFIG_NAME} names the target {target}, but no tensor belongs to it")


def _tensor_error(folder: Path, what: str, *, got: str = "") -> AdapterError:
    return AdapterError(
        "adapter-tensors", f"{folder}: {what}", got=got, hint="the file is damaged or incomplete; copy it again"
    )
