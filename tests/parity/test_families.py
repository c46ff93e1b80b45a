"""Every family against transformers: logits of tiny random models, packed and alone, from folders and GGUF files.

The bound is the issue's: 1e-5 in the largest absolute difference, fp32.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tenon.bases.families import FAMILIES
from tenon.bases.locate import locate_base
from tenon.bases.read import read_facts
from tenon.batch import NO_SLOT
from tenon.data.pack import PackOptions, bare_row, pack_rows
from tenon.models.decoder import Decoder
from tenon.models.load import load_decoder
from tenon.models.prepare import prepare_base
from tenon.settings import Settings
from tests.tiny_bases import VARIANTS, VOCAB, random_model, save_base, write_gguf

BOUND = 1e-5
CPU = torch.device("cpu")
# Longer than every window of the variants; one row of one token; two of equal length, which attend ungathered.
LENGTHS = (40, 23, 23, 9, 1)
GGUF_VARIANTS = (
    "llama",
    "llama-tied",
    "llama-head-dim",
    "llama-biases",
    "llama-rope-llama3",
    "llama-rope-linear",
    "qwen2",
    "qwen2-tied-rope-yarn",
    "qwen3",
    "qwen3-tied",
    "smollm3",
)


def sample_rows() -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, VOCAB, length).tolist() for length in LENGTHS]


@torch.no_grad()
def reference_logits(model: PreTrainedModel, rows: list[list[int]]) -> list[torch.Tensor]:
    return [model(torch.tensor([row])).logits[0] for row in rows]


@torch.no_grad()
def our_logits(decoder: Decoder, rows: list[list[int]]) -> list[torch.Tensor]:
    """The rows in one batch; logits of each row, in the order given."""
    packed = [bare_row(NO_SLOT, row) for row in rows]
    for i, row in enumerate(packed):
        packed[i] = type(row)(row.slot, row.ids, row.supervised, index=i)
    (batch,) = pack_rows(packed, PackOptions(10_000, share_prefix=False), CPU)
    logits = decoder.logits(decoder.forward(batch))
    found = {
        index: logits[start:stop]
        for index, start, stop in zip(batch.rows, batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)
    }
    assert sorted(found) == list(range(len(rows)))
    return [found[i] for i in range(len(rows))]


def load_spec(spec: str, settings: Settings) -> Decoder:
    location = locate_base(spec, settings)
    folder = prepare_base(location, settings)
    return load_decoder(folder, read_facts(location), dtype=torch.float32, device=CPU)


def assert_equal_logits(decoder: Decoder, model: PreTrainedModel) -> None:
    rows = sample_rows()
    expected = reference_logits(model, rows)
    assert min(float(e.abs().max()) for e in expected) > 0.5, "logits near zero would prove nothing"
    packed = our_logits(decoder, rows)
    alone = [our_logits(decoder, [row])[0] for row in rows]
    for e, p, a in zip(expected, packed, alone, strict=True):
        assert float((e - a).abs().max()) <= BOUND
        assert float((e - p).abs().max()) <= BOUND


def test_the_variants_cover_every_family() -> None:
    assert {make().model_type for make in VARIANTS.values()} == {family.name for family in FAMILIES}
    assert len(VARIANTS) == 19


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
