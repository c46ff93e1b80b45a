"""Loading is strict: whatever is wrong with the files is one error that names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tenon.bases.read import folder_facts
from tenon.errors import BaseModelError
from tenon.models.load import load_decoder, read_tensors
from tests.tiny_bases import save_base

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_base("llama", tmp_path)
    return tmp_path


def refused(folder: Path) -> BaseModelError:
    with pytest.raises(BaseModelError) as caught:
        load_decoder(folder, folder_facts(folder), dtype=torch.float32, device=CPU)
    return caught.value


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Save the weights again with some tensors replaced (None: left out)."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in change.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_arrive_unchanged(dtype: torch.dtype, folder: Path) -> None:
    decoder = load_decoder(folder, folder_facts(folder), dtype=dtype, device=CPU)
    saved, loaded = load_file(folder / "model.safetensors"), decoder.named_tensors()
    assert set(saved) == set(loaded) and len(saved) == 4 * 9 + 3
    for name, tensor in saved.items():
        assert torch.equal(loaded[name], tensor.to(dtype)), name
        assert loaded[name].data_ptr() != tensor.data_ptr()


def test_read_tensors_gives_each_once(folder: Path) -> None:
    names = [name for name, _ in read_tensors(folder)]
    assert len(names) == len(set(names)) == 4 * 9 + 3


def test_p14_a_missing_tensor_is_named(folder: Path) -> None:
    rewrite(folder, {"model.layers.2.mlp.up_proj.weight": None})
    error = refused(folder)
    assert error.code == "base-tensor-missing" and "model.layers.2.mlp.up_proj.weight" in error.what


def test_p14_a_surplus_tensor_is_named(folder: Path) -> None:
    rewrite(folder, {"model.layers.2.self_attn.q_proj.bias": torch.zeros(64)})
    error = refused(folder)
    assert error.code == "base-tensor-unexpected" and "model.layers.2.self_attn.q_proj.bias" in error.what


def test_p14_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    rewrite(folder, {"model.layers.0.mlp.down_proj.weight": torch.zeros(96, 64)})
    error = refused(folder)
    assert error.code == "base-tensor-shape" and "model.layers.0.mlp.down_proj.weight" in error.what
    assert "96, 64" in error.got


def test_frequencies_of_old_checkpoints_are_ignored(folder: Path) -> None:
    rewrite(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    load_decoder(folder, folder_facts(folder), dtype=torch.float32, device=CPU)


def test_a_head_saved_beside_a_tied_embedding_is_ignored(tmp_path: Path) -> None:
    save_base("llama-tied", tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(tmp_path, {"lm_head.weight": embedding.clone()})
    decoder = load_decoder(tmp_path, folder_facts(tmp_path), dtype=torch.float32, device=CPU)
    assert torch.equal(decoder.head_VD, embedding)


@pytest.mark.parametrize("lost_bytes", [1, 5_000, 200_000])
def test_a_truncated_file_names_the_tensor(lost_bytes: int, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-lost_bytes])
    error = refused(folder)
    assert error.code == "base-damaged" and str(file) in error.what and "inside the tensor" in error.what


def test_a_truncated_last_shard_shows_before_anything_is_read(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = {"a.safetensors": dict(list(tensors.items())[:9]), "b.safetensors": dict(list(tensors.items())[9:])}
    for name, part in halves.items():
        save_file(part, folder / name)
    weight_map = {tensor: name for name, part in halves.items() for tensor in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    last = folder / "b.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(BaseModelError) as caught:
        next(read_tensors(folder))
    assert caught.value.code == "base-damaged" and "b.safetensors" in caught.value.what


def test_offsets_that_overlap_are_damage(folder: Path) -> None:
    file = folder / "model.safetensors"
    header = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    header["b"] = {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(24))
    error = refused(folder)
    assert error.code == "base-damaged" and str(file) in error.what
