"""A whole checkpoint that transformers and bitsandbytes quantised to nf4: the decoder that we quantise ourselves.

On a CPU bitsandbytes rounds the code of an absmax to a neighbour where it lies in the middle between two (see
tests/kernels/test_nf4.py), and dequantises wrongly where a matrix has no whole blocks a row: the bases here have.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tenon.adapters.bank import AdapterBank
from tenon.bases.facts import ModelFacts
from tenon.bases.read import folder_facts
from tenon.data.pack import PackOptions, PackRow, bare_row, pack_rows
from tenon.kernels.nf4 import Nf4Weight
from tenon.models.decoder import Decoder
from tenon.models.frozen import FrozenKind
from tenon.models.frozen_formats import Nf4Linear
from tenon.models.load import load_decoder, read_tensors
from tenon.train.step import StepOptions, accumulate_window
from tests.tiny import CPU, random_slot, slot_shape
from tests.tiny_bases import VARIANTS

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed", exc_type=ImportError)
pytest.importorskip("accelerate", reason="accelerate is not installed, which transformers quantises with")

from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel  # noqa: E402

IDS = [5, 17, 200, 3, 99, 250, 8]


@dataclass(frozen=True)
class Both:
    """The same base as it was and as it was quantised; transformers' logits with what bitsandbytes dequantises."""

    plain: Path
    packed: Path
    logits_TV: Tensor


def random_model(variant: str) -> PreTrainedModel:
    config = VARIANTS[variant]()
    config.intermediate_size = 128
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * drawn if "norm" in name else 0.1 * drawn)
    return model.eval()


@pytest.fixture(scope="module", params=("llama", "qwen2", "qwen3-tied"))
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp("bases")
    plain = random_model(request.param)
    plain.save_pretrained(folder / "plain")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    packed = AutoModelForCausalLM.from_pretrained(
        folder / "plain", quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    packed.save_pretrained(folder / "packed")
    with torch.no_grad():
        for name, module in packed.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                quantised: Any = module.weight
                weight = bnb.functional.dequantize_4bit(quantised.data, quantised.quant_state)
                plain.get_parameter(f"{name}.weight").copy_(weight)
        logits_TV = plain(torch.tensor([IDS])).logits[0]
    return Both(folder / "plain", folder / "packed", logits_TV)


def load(folder: Path, kind: FrozenKind) -> tuple[ModelFacts, Decoder]:
    facts = folder_facts(folder)
    return facts, load_decoder(folder, facts, dtype=torch.float32, device=CPU, kind=kind)


def gradient(facts: ModelFacts, decoder: Decoder) -> Tensor:
    """Of one slot at all modules, for one row."""
    bank = AdapterBank(facts, dtype=torch.float32, device=CPU)
    slot = bank.slots[random_slot(bank, slot_shape(facts), 0)]
    row = PackRow(0, np.array(IDS), np.ones(len(IDS), dtype=bool))
    accumulate_window(decoder, bank, [row], StepOptions(64, False))
    assert slot.gradients_P is not None and bool(slot.gradients_P.any())
    return slot.gradients_P


def test_a_whole_checkpoint_is_the_decoder_that_we_quantise(both: Both) -> None:
    facts, loaded = load(both.packed, "nf4")
    _, own = load(both.plain, "nf4")
    assert facts.stored == "nf4" and len(list(read_tensors(both.packed))) > 5 * 7 * facts.layers
    modules = neighbours = codes = 0
    for module, found in zip(modules_of(own), modules_of(loaded), strict=True):
        assert module.nested is not None and found.nested is not None
        assert module.shape == found.shape and torch.equal(module.packed_N, found.packed_N)
        assert torch.equal(module.nested.absmax_C, found.nested.absmax_C)
        assert torch.equal(module.nested.offset, found.nested.offset)
        apart = (module.absmax_B.int() - found.absmax_B.int()).abs()
        assert int(apart.max()) <= 1
        modules, neighbours, codes = modules + 1, neighbours + int(apart.sum()), codes + len(apart)
    assert modules == 7 * facts.layers and neighbours <= codes / 500
    tensors = own.named_tensors()
    for name, tensor in loaded.named_tensors().items():
        torch.testing.assert_close(tensor, tensors[name], rtol=0.02 if neighbours else 0.0, atol=0.0)
    mine, theirs = gradient(facts, own), gradient(facts, loaded)
    assert float((mine - theirs).norm()) <= (1e-2 if neighbours else 0.0) * float(mine.norm())


def modules_of(decoder: Decoder) -> list[Nf4Weight]:
    """Every quantised module, layer by layer."""
    linears = [linear for layer in decoder.layers for linear in layer.stacks.values()]
    assert all(isinstance(linear, Nf4Linear) for linear in linears)
    return [
        linear.modules[start] for linear in linears if isinstance(linear, Nf4Linear) for start in sorted(linear.modules)
    ]


def test_it_says_what_transformers_says(both: Both) -> None:
    _, loaded = load(both.packed, "nf4")
    (batch,) = pack_rows([bare_row(-1, IDS)], PackOptions(64), CPU)
    torch.testing.assert_close(loaded.logits(loaded.forward(batch)), both.logits_TV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "int8"])
def test_it_can_be_kept_in_another_format(both: Both, kind: FrozenKind) -> None:
    """Dequantised as it comes: dense gives the very weights that nf4 multiplies with."""
    _, loaded = load(both.packed, kind)
    _, packed = load(both.packed, "nf4")
    error = 0.0 if kind == "dense" else 0.01
    for name, tensor in packed.named_tensors().items():
        assert float((loaded.named_tensors()[name] - tensor).norm()) <= error * float(tensor.norm()), name
