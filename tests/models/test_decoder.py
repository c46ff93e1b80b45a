"""The decoder takes each of its tensors exactly once, with its shape, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tenon.batch import NO_SLOT
from tenon.data.pack import PackOptions, bare_row, pack_rows
from tenon.errors import BaseModelError
from tenon.models.decoder import Decoder
from tests.tiny import CPU, tiny_decoder, tiny_facts


def tensors(*, tied: bool = True) -> dict[str, Tensor]:
    """Every tensor of a tiny decoder, copied."""
    named = tiny_decoder(tiny_facts(tied=tied)).named_tensors()
    return {name: tensor.clone() for name, tensor in named.items()}


def fresh(*, tied: bool = True, dtype: torch.dtype = torch.float32) -> Decoder:
    return Decoder(tiny_facts(tied=tied), dtype=dtype, device=CPU)


def refusal(decoder: Decoder, named: dict[str, Tensor]) -> BaseModelError:
    with pytest.raises(BaseModelError) as caught:
        decoder.load_tensors(named.items())
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("tied", [True, False])
def test_what_goes_in_comes_out(tied: bool) -> None:
    given, decoder = tensors(tied=tied), fresh(tied=tied)
    assert len(given) == 2 + (not tied) + 3 * (2 + 7)
    decoder.load_tensors(reversed(given.items()))
    for name, tensor in decoder.named_tensors().items():
        assert torch.equal(tensor, given[name]), name
    assert (decoder.head_VD is decoder.embedding_VD) == tied
    assert torch.equal(decoder.linear(1, "up_proj"), given["model.layers.1.mlp.up_proj.weight"])


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight"])
def test_p14_a_missing_tensor_is_named(name: str) -> None:
    given = tensors()
    del given[name]
    error = refusal(fresh(), given)
    assert error.code == "base-tensor-missing" and name in error.what and "lacks 1 of" in error.what


def test_p14_the_head_of_a_base_that_does_not_tie_it_is_missed() -> None:
    assert "lm_head.weight" in refusal(fresh(tied=False), tensors(tied=True)).what


@pytest.mark.parametrize("name", ["model.layers.3.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "x"])
def test_p14_a_tensor_that_does_not_belong_is_named(name: str) -> None:
    error = refusal(fresh(), tensors() | {name: torch.zeros(3)})
    assert error.code == "base-tensor-unexpected" and name in error.what


def test_p14_a_tensor_that_comes_twice_is_refused() -> None:
    given = list(tensors().items())
    with pytest.raises(BaseModelError, match="base-tensor-unexpected"):
        fresh().load_tensors([*given, given[3]])


@pytest.mark.parametrize("shape", [(97, 31), (96, 32), (97 * 32,)])
def test_p14_a_tensor_of_another_shape_is_named_with_both_shapes(shape: tuple[int, ...]) -> None:
    error = refusal(fresh(), tensors() | {"model.embed_tokens.weight": torch.zeros(shape)})
    assert error.code == "base-tensor-shape"
    assert "model.embed_tokens.weight" in error.what and "[97, 32]" in error.what and error.got == str(list(shape))


def test_a_tied_head_and_old_rotary_tables_are_passed_over() -> None:
    extra = {"lm_head.weight": torch.zeros(97, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    decoder = fresh()
    decoder.load_tensors((tensors() | extra).items())
    assert bool(decoder.head_VD.any())


def test_weights_are_converted_to_the_dtype_of_the_decoder() -> None:
    decoder = fresh(dtype=torch.bfloat16)
    decoder.load_tensors(tensors().items())
    assert all(tensor.dtype == torch.bfloat16 for tensor in decoder.named_tensors().values())


def test_rotary_tables_grow_with_the_longest_row() -> None:
    """A long row after short ones gives what it gives a decoder that never saw a short one."""
    ids = [i % 90 + 1 for i in range(600)]
    used, unused = tiny_decoder(), tiny_decoder()
    with torch.no_grad():
        for length in (3, 300):
            (batch,) = pack_rows([bare_row(NO_SLOT, ids[:length])], PackOptions(999), CPU)
            used.forward(batch)
        (batch,) = pack_rows([bare_row(NO_SLOT, ids)], PackOptions(999), CPU)
        assert torch.equal(used.forward(batch), unused.forward(batch))
