"""Logits of the same rows from transformers and from our decoder, packed and alone: for the tests and the benchmark."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from tenon.bases.locate import locate_base
from tenon.bases.read import read_facts
from tenon.batch import NO_SLOT
from tenon.data.pack import PackOptions, bare_row, pack_rows
from tenon.models.decoder import Decoder
from tenon.models.load import load_decoder
from tenon.models.prepare import prepare_base
from tenon.settings import Settings
from tests.tiny_bases import VOCAB

BOUND = 1e-5
CPU = torch.device("cpu")
# Longer than every window of the variants; two rows of equal length, which attend ungathered; one row of one token.
LENGTHS = (40, 23, 23, 9, 1)


@dataclass(frozen=True, slots=True)
class Differences:
    """Largest absolute differences from transformers, and the smallest of the rows' largest logits (a guard)."""

    packed: float
    alone: float
    scale: float


def sample_rows() -> list[list[int]]:
    """Rows of random tokens, the same ones every time."""
    draw = np.random.default_rng(0)
    return [draw.integers(0, VOCAB, length).tolist() for length in LENGTHS]


@torch.no_grad()
def reference_logits(model: PreTrainedModel, rows: list[list[int]]) -> list[torch.Tensor]:
    """Each row by itself in transformers."""
    return [model(torch.tensor([row])).logits[0] for row in rows]


@torch.no_grad()
def our_logits(decoder: Decoder, rows: list[list[int]]) -> list[torch.Tensor]:
    """All rows in one batch; the logits of each, in the order given."""
    packed = [dataclasses.replace(bare_row(NO_SLOT, row), index=i) for i, row in enumerate(rows)]
    (batch,) = pack_rows(packed, PackOptions(10_000, share_prefix=False), CPU)
    logits = decoder.logits(decoder.forward(batch))
    spans = zip(batch.rows, batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)
    found = {index: logits[start:stop] for index, start, stop in spans}
    assert sorted(found) == list(range(len(rows)))
    return [found[i] for i in range(len(rows))]


def load_spec(spec: str, settings: Settings) -> Decoder:
    """The whole way from what a recipe says to a decoder."""
    location = locate_base(spec, settings)
    folder = prepare_base(location, settings)
    return load_decoder(folder, read_facts(location), dtype=torch.float32, device=CPU)


def measure(decoder: Decoder, model: PreTrainedModel) -> Differences:
    """Compare all rows, in one batch and each alone."""
    rows = sample_rows()
    expected = reference_logits(model, rows)
    packed = our_logits(decoder, rows)
    alone = [our_logits(decoder, [row])[0] for row in rows]
    return Differences(
        packed=max(float((e - p).abs().max()) for e, p in zip(expected, packed, strict=True)),
        alone=max(float((e - a).abs().max()) for e, a in zip(expected, alone, strict=True)),
        scale=min(float(e.abs().max()) for e in expected),
    )
