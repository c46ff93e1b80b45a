"""GGUF headers and what is made of them, on files that the gguf package wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenon.bases.facts import RopeFacts
from tenon.bases.gguf_facts import gguf_facts
from tenon.bases.gguf_header import TENSOR_TYPES, read_gguf
from tenon.errors import BaseModelError
from tests.tiny_bases import VOCAB, random_model, write_gguf


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "base.gguf"
    write_gguf(random_model("llama"), path, kind=gguf.GGMLQuantizationType.Q8_0)
    return path


def with_extra(folder: Path, extra: Callable[[gguf.GGUFWriter], None], variant: str = "llama") -> Path:
    write_gguf(random_model(variant), folder / "base.gguf", extra=extra)
    return folder / "base.gguf"


def refused(path: Path) -> BaseModelError:
    with pytest.raises(BaseModelError) as caught:
        gguf_facts(read_gguf(path))
    assert caught.value.hint and str(path) in caught.value.what
    return caught.value


def test_the_header_equals_that_of_the_gguf_package(whole: Path) -> None:
    header, reference = read_gguf(whole), gguf.GGUFReader(whole)
    assert len(header.tensors) == len(reference.tensors) > 30
    for tensor in reference.tensors:
        ours = header.tensors[tensor.name]
        assert ours.shape == tuple(reversed(tensor.shape.tolist()))
        assert (ours.begin, ours.end - ours.begin) == (tensor.data_offset, tensor.n_bytes)
        assert ours.type_name == tensor.tensor_type.name
    fields = {name: field for name, field in reference.fields.items() if not name.startswith("GGUF.")}
    assert set(fields) == set(header.values) | set(header.arrays)
    for name, field in fields.items():
        ours = header.values[name] if name in header.values else list(header.arrays[name])
        assert ours == field.contents()


def test_block_sizes_equal_those_of_the_gguf_package() -> None:
    assert len(TENSOR_TYPES) == 22
    for number, (name, elements, size_bytes) in TENSOR_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, *gguf.GGML_QUANT_SIZES[kind]) == (name, elements, size_bytes)


def test_facts_of_a_gguf_base(whole: Path) -> None:
    facts = gguf_facts(read_gguf(whole))
    assert (facts.family, facts.layers, facts.hidden, facts.heads, facts.kv_heads) == ("llama", 4, 64, 4, 2)
    assert (facts.head_dim, facts.feed_forward, facts.vocab, facts.context_tokens) == (16, 96, VOCAB, 512)
    assert (facts.norm_eps, facts.tied_head, facts.rope) == (1e-6, False, RopeFacts())
    assert (facts.bos_id, facts.eos_ids) == (1, (2,))


def test_the_scaling_of_llama_3_is_recognised_by_its_factors(tmp_path: Path) -> None:
    path = with_extra(tmp_path, lambda writer: None, "llama-rope-llama3")
    rope = gguf_facts(read_gguf(path)).rope
    assert rope == RopeFacts(
        kind="llama3", theta=500_000.0, factor=8.0, low_freq_factor=1.0, original_context_tokens=8192
    )


def test_other_frequency_factors_are_refused(tmp_path: Path) -> None:
    error = refused(with_extra(tmp_path, lambda writer: None, "llama-rope-llama3-short"))
    assert error.code == "base-unsupported" and "rope_freqs" in error.what


@pytest.mark.parametrize(
    ("extra", "key"),
    [
        (lambda w: w.add_expert_count(8), "llama.expert_count"),
        (lambda w: w.add_sliding_window(64), "llama.attention.sliding_window"),
        (lambda w: w.add_logit_scale(2.0), "llama.logit_scale"),
        (lambda w: w.add_uint16("split.count", 3), "split"),
        (lambda w: w.add_string("llama.rope.scaling.type", "longrope"), "llama.rope.scaling.type"),
    ],
)
def test_features_that_are_not_done_are_refused_by_name(
    extra: Callable[[gguf.GGUFWriter], None], key: str, tmp_path: Path
) -> None:
    error = refused(with_extra(tmp_path, extra))
    assert error.code == "base-unsupported" and key in error.what


def test_an_unknown_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    error = refused(tmp_path / "base.gguf")
    assert (error.code, error.got) == ("base-unknown-architecture", "gemma3")


def test_partial_rotation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "base.gguf"
    write_gguf(random_model("llama"), path)
    key = b"llama.rope.dimension_count"
    data = bytearray(path.read_bytes())
    at = data.index(key) + len(key) + 4
    data[at : at + 4] = (8).to_bytes(4, "little")
    path.write_bytes(data)
    error = refused(path)
    assert error.code == "base-unsupported" and "rotate in part" in error.what


@pytest.mark.parametrize("keep", [0, 3, 4, 10, 23, 30, 200, 3000, 9000, -1])
def test_a_file_that_was_cut_off(keep: int, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "base.gguf"
    path.write_bytes(whole.read_bytes()[:keep])
    assert refused(path).code == ("base-empty" if keep == 0 else "base-damaged")


@pytest.mark.parametrize(
    ("at", "value", "code"),
    [
        (0, b"GGML", "base-damaged"),
        (4, (1).to_bytes(4, "little"), "base-unsupported"),
        (4, (3).to_bytes(4, "big"), "base-unsupported"),
        (8, (2**60).to_bytes(8, "little"), "base-damaged"),
        (16, (2**60).to_bytes(8, "little"), "base-damaged"),
        (24, (2**63).to_bytes(8, "little"), "base-damaged"),
    ],
)
def test_a_header_with_wrong_numbers(at: int, value: bytes, code: str, whole: Path, tmp_path: Path) -> None:
    data = bytearray(whole.read_bytes())
    data[at : at + len(value)] = value
    path = tmp_path / "base.gguf"
    path.write_bytes(data)
    assert refused(path).code == code


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, 900), value=st.integers(0, 255), more=st.integers(0, 255))
def test_a_flipped_byte_is_read_or_refused_but_never_crashes(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, at: int, value: int, more: int
) -> None:
    data = bytearray(whole.read_bytes())
    data[at], data[(at * 7) % 1500] = value, more
    path = tmp_path_factory.getbasetemp() / "flipped.gguf"
    path.write_bytes(data)
    try:
        gguf_facts(read_gguf(path))
    except BaseModelError as error:
        assert error.code.startswith("base-")
