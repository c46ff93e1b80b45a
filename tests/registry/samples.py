"""Small adapter folders for the registry's tests, whole and broken, written with numpy alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tenon.bases.facts import MODULE_PATHS
from tenon.registry.entry import EntryDraft

PREFIX = "base_model.model.model."
MODULES = ("q_proj", "v_proj")
DRAFT = EntryDraft(base_spec="tiny", base_hash="b" * 64, run="run-1", data_hash="d" * 64, base_format="nf4")


def tensors(*, rank: int = 4, layers: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """A and B of q and v in every layer: 32 inputs, 16 outputs."""
    draw, made = np.random.default_rng(seed), {}
    for layer in range(layers):
        for module in MODULES:
            site = f"{PREFIX}layers.{layer}.{MODULE_PATHS[module]}"
            made[f"{site}.lora_A.weight"] = draw.normal(size=(rank, 32)).astype(np.float32)
            made[f"{site}.lora_B.weight"] = draw.normal(size=(16, rank)).astype(np.float32)
    return made


def config(**changes: Any) -> dict[str, Any]:
    """PEFT's config of `tensors()`, with some keys changed."""
    plain = {"peft_type": "LORA", "base_model_name_or_path": "tiny", "r": 4, "lora_alpha": 8}
    return {**plain, "target_modules": list(MODULES), "task_type": "CAUSAL_LM", **changes}


def write_adapter(
    folder: Path, weights: dict[str, np.ndarray] | None = None, settings: dict[str, Any] | None = None
) -> Path:
    """An adapter folder, whole unless the parts given are not."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors() if weights is None else weights, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config() if settings is None else settings))
    return folder
