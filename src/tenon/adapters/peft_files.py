"""Adapter files in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`, out and in, strictly.

What is written loads in PEFT and in vLLM; what is read has passed `registry.peft_check`: complete, of the promised
ranks, finite, and free of features that Tenon would have to ignore (DoRA, trained biases, whole saved modules).

Shape legend: D inputs, O outputs, R rank. This module does not know training, registries or bases.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tenon.adapters.bank import AdapterBank, SiteShape, Slot, SlotShape
from tenon.bases.facts import MODULE_PATHS, parse_site
from tenon.errors import AdapterError
from tenon.registry.peft_check import CONFIG_NAME, TENSORS_NAME, AdapterFacts, describe_adapter, describe_contents
from tenon.registry.safetensors_header import FLOATS, TensorFacts

_PREFIX = "base_model.model.model."
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter read from disk: its shape, its matrices (A, B) by site, and its config as it was.

    `read_adapter` gives fp32, `parse_adapter` what the file has: views of what was read.
    """

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
    """Read PEFT files. Raises AdapterError: those of `registry.peft_check.describe_adapter`, each naming the file and
    what is wrong.
    """
    facts = describe_adapter(folder)
    path = folder / TENSORS_NAME
    try:
        with safe_open(path, framework="pt") as file:
            matrices = {
                site: tuple(file.get_tensor(f"{_PREFIX}{site}.lora_{x}.weight").to(torch.float32) for x in "AB")
                for site in facts.ranks_and_scales
            }
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            "adapter-tensors", f"{path} cannot be read", got=str(error)[:200], hint="the file is damaged; copy it again"
        ) from error
    return AdapterFiles(_shape(facts), {site: (a_RD, b_OR) for site, (a_RD, b_OR) in matrices.items()}, facts.config)


def parse_adapter(folder: Path, contents: Mapping[str, bytearray]) -> AdapterFiles:
    """The adapter in files that were read, by name. folder: where they were, for the words of errors.

    Raises AdapterError: those of `registry.peft_check.describe_contents`.
    """
    facts, tensors = describe_contents(folder, contents)
    content = contents[TENSORS_NAME]

    def matrix(site: str, letter: str) -> Tensor:
        return _tensor(content, tensors[f"{_PREFIX}{site}.lora_{letter}.weight"])

    matrices = {site: (matrix(site, "A"), matrix(site, "B")) for site in facts.ranks_and_scales}
    return AdapterFiles(_shape(facts), matrices, facts.config)


def _tensor(content: bytearray, facts: TensorFacts) -> Tensor:
    """A tensor over the bytes that were read."""
    width, _ = FLOATS[facts.dtype]
    count = (facts.stop - facts.start) // width
    # As integers: numpy has no bfloat16. A header of odd length leaves them where torch cannot read.
    bits = np.require(np.frombuffer(content, f"<i{width}", count, facts.start), requirements="A")
    return torch.from_numpy(bits).view(_DTYPES[facts.dtype]).view(facts.shape)


def _shape(facts: AdapterFacts) -> SlotShape:
    sites = {site: SiteShape(rank, scale) for site, (rank, scale) in facts.ranks_and_scales.items()}
    dropout = facts.config.get("lora_dropout")
    return SlotShape(sites, float(dropout) if isinstance(dropout, int | float) else 0.0)


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
    copy_matrices(files, slot.matrices(), slot.name)
    slot.refresh()


def copy_matrices(files: AdapterFiles, wanted: Mapping[str, tuple[Tensor, Tensor]], name: str) -> None:
    """Copy matrices where they are wanted, by site. name: of the slot. Raises AdapterError adapter-tensors."""
    if set(wanted) != set(files.matrices):
        odd = sorted(set(wanted) ^ set(files.matrices))[0]
        raise AdapterError(
            "adapter-tensors",
            f"the adapter and the slot {name} do not adapt the same matrices; the first that differs is {odd}",
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
