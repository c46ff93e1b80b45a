"""Every family against transformers: logits of tiny random models, packed and alone, from folders and GGUF files.

The bound is the issue's: 1e-5 in the largest absolute difference, fp32.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from transformers import PreTrainedModel

from tenon.bases.families import FAMILIES
from tenon.bases.locate import locate_base
from tenon.bases.read import read_facts
from tenon.models.decoder import Decoder
from tenon.models.load import load_decoder
from tenon.settings import Settings
from tests.parity.logits import BOUND, CPU, load_spec, measure, our_logits, reference_logits, sample_rows
from tests.tiny_bases import GGUF_VARIANTS, VARIANTS, random_model, save_base, write_gguf


def assert_equal_logits(decoder: Decoder, model: PreTrainedModel) -> None:
    differences = measure(decoder, model)
    assert differences.scale > 0.5, "logits near zero would prove nothing"
    assert differences.packed <= BOUND
    assert differences.alone <= BOUND


def test_the_variants_cover_every_family() -> None:
    assert {make().model_type for make in VARIANTS.values()} == {family.name for family in FAMILIES}
    assert (len(VARIANTS), len(GGUF_VARIANTS)) == (19, 11)


@pytest.mark.parametrize("variant", VARIANTS)
def test_p04_logits_equal_transformers(variant: str, tmp_path: Path, settings: Settings) -> None:
    model = save_base(variant, tmp_path / "base")
    assert_equal_logits(load_spec(str(tmp_path / "base"), settings), model)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("variant", GGUF_VARIANTS)
def test_gguf_logits_equal_transformers(variant: str, kind: str, tmp_path: Path, settings: Settings) -> None:
    model = random_model(variant)
    write_gguf(model, tmp_path / "base.gguf", kind=gguf.GGMLQuantizationType[kind])
    assert_equal_logits(load_spec(str(tmp_path / "base.gguf"), settings), model)


@pytest.mark.parametrize("variant", ["mistral-window", "qwen2-window", "qwen3-biases-window", "smollm3-window"])
def test_windows_matter(variant: str, tmp_path: Path, settings: Settings) -> None:
    """The windows of the variants are shorter than the rows: without them the logits differ."""
    model = save_base(variant, tmp_path)
    location = locate_base(str(tmp_path), settings)
    facts = read_facts(location)
    full = facts.model_copy(update={"window_layers": (0,) * facts.layers})
    decoder = load_decoder(location.path, full, dtype=torch.float32, device=CPU)
    rows = sample_rows()[:1]
    assert float((our_logits(decoder, rows)[0] - reference_logits(model, rows)[0]).abs().max()) > 0.01


def test_sharded_folders_load(tmp_path: Path, settings: Settings) -> None:
    model = save_base("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_equal_logits(load_spec(str(tmp_path), settings), model)
