"""What is no adapter is refused, each time with what is wrong and where; nothing is run, guessed or skipped."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from tenon.errors import AdapterError
from tenon.registry.peft_check import check_adapter
from tenon.registry.safetensors_header import first_not_finite, read_header
from tests.registry.samples import PREFIX, config, tensors, write_adapter

FIRST = f"{PREFIX}layers.0.self_attn.q_proj.lora_A.weight"


def _refusal(folder: Path) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        check_adapter(folder)
    assert caught.value.hint
    assert str(folder) in caught.value.what
    return caught.value


def test_a_whole_adapter_says_what_it_is(tmp_path: Path) -> None:
    facts = check_adapter(write_adapter(tmp_path))
    assert (facts.rank, facts.alpha, facts.scale) == (4, 8.0, 2.0)
    assert facts.targets == ("q_proj", "v_proj")
    assert facts.sites[0] == "layers.0.self_attn.q_proj"
    assert len(facts.sites) == 4
    assert facts.parameters == sum(array.size for array in tensors().values())


def test_rslora_scales_by_the_root_of_the_rank(tmp_path: Path) -> None:
    assert check_adapter(write_adapter(tmp_path, settings=config(use_rslora=True))).scale == 4.0


def test_patterns_give_each_matrix_its_rank(tmp_path: Path) -> None:
    weights = tensors()
    for name, small in tensors(rank=2).items():
        if ".layers.1." in name and "v_proj" in name:
            weights[name] = small
    patterns = {"rank_pattern": {"layers.1.self_attn.v_proj": 2}, "alpha_pattern": {r"^model\.layers\.1.*v_proj": 6}}
    assert check_adapter(write_adapter(tmp_path / "a", weights, config(**patterns))).rank == 4
    error = _refusal(write_adapter(tmp_path / "b", weights))
    assert error.code == "adapter-tensors"
    assert "layers.1.self_attn.v_proj are not of rank 4" in error.what


def _without(name: str) -> dict[str, np.ndarray]:
    return {other: array for other, array in tensors().items() if other != name}


@pytest.mark.parametrize(
    ("weights", "settings", "words"),
    [
        (_without(FIRST), None, "layers.0.self_attn.q_proj has no lora_A"),
        (_without(FIRST.replace("lora_A", "lora_B")), None, "layers.0.self_attn.q_proj has no lora_B"),
        (tensors() | {"lm_head.weight": np.ones((2, 2), np.float32)}, None, "lm_head.weight belongs to no linear"),
        (
            tensors() | {FIRST.replace("self_attn", "mlp"): np.ones((4, 32), np.float32)},
            None,
            "mlp.q_proj.lora_A.weight belongs to no linear",
        ),
        (tensors() | {FIRST: np.ones((3, 32), np.float32)}, None, "q_proj are not of rank 4"),
        (tensors() | {FIRST: np.ones(32, np.float32)}, None, "is no matrix"),
        (tensors() | {FIRST: np.ones((4, 32), np.int32)}, None, "is of type 'I32'"),
        (tensors() | {FIRST: np.ones((4, 0), np.float32)}, None, "has the shape [4, 0]"),
        ({}, None, "there is no LoRA matrix"),
        (None, config(target_modules=["q_proj", "v_proj", "o_proj"]), "names the target o_proj"),
        (None, config(layers_to_transform=[0, 1, 2]), "promises q_proj in layer 2"),
    ],
)
def test_p14_a_missing_extra_or_misshaped_tensor_is_named(tmp_path: Path, weights, settings, words: str) -> None:
    error = _refusal(write_adapter(tmp_path, weights, settings))
    assert error.code == "adapter-tensors"
    assert words in error.what


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_p15_a_weight_that_is_not_finite_is_named(tmp_path: Path, bad: float, dtype: type) -> None:
    weights = {name: array.astype(dtype) for name, array in tensors().items()}
    assert check_adapter(write_adapter(tmp_path, weights)).rank == 4
    weights[FIRST][3, 31] = bad
    error = _refusal(write_adapter(tmp_path, weights))
    assert error.code == "adapter-not-finite"
    assert FIRST in error.what


@pytest.mark.parametrize(("bits", "finite"), [(0x7F80, False), (0xFF80, False), (0x7FC0, False), (0x7F7F, True)])
def test_p15_bfloat16_is_checked_too(tmp_path: Path, bits: int, finite: bool) -> None:
    header = json.dumps({"x": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<HH", 0x3F80, bits))
    assert first_not_finite(path, read_header(path)) == (None if finite else "x")


@pytest.mark.parametrize("name", ["adapter_model.bin", "training_args.pt", "x.pkl"])
def test_p35_a_pickle_beside_the_weights_is_refused(tmp_path: Path, name: str) -> None:
    write_adapter(tmp_path)
    (tmp_path / name).write_bytes(b"\x80\x04.")
    error = _refusal(tmp_path)
    assert error.code == "adapter-pickle"
    assert name in error.what


@pytest.mark.parametrize("rank", [0, -4, 2049, 10**30])
def test_p35_the_rank_is_bounded(tmp_path: Path, rank: int) -> None:
    assert _refusal(write_adapter(tmp_path, settings=config(r=rank))).code == "adapter-rank"


def test_p35_sizes_are_bounded(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    with (tmp_path / "adapter_config.json").open("a") as file:
        file.write(" " * 4_000_001)
    assert _refusal(tmp_path).code == "adapter-too-large"
    write_adapter(tmp_path)
    with (tmp_path / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(17_000_000_000)  # sparse: it takes no space
    assert _refusal(tmp_path).code == "adapter-too-large"


@pytest.mark.parametrize("pattern", ["(a+)+", "(x|x)*y", "a" * 201, ".*.*.*.*", "a{9}"])
def test_p35_a_pattern_cannot_make_the_reader_run_for_ever(tmp_path: Path, pattern: str) -> None:
    started = time.monotonic()
    error = _refusal(write_adapter(tmp_path, settings=config(rank_pattern={pattern: 4})))
    assert error.code == "adapter-config"
    assert "too complicated" in error.what
    assert time.monotonic() - started < 1.0


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1]},
        {"layer_replication": [[0, 2]]},
    ],
)
def test_p14_features_that_would_be_lost_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    error = _refusal(write_adapter(tmp_path, settings=config(**changes)))
    assert error.code == "adapter-unsupported"
    assert next(iter(changes)) in error.what


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "[" * 100_000,
        "{}",
        json.dumps(config(peft_type="IA3")),
        json.dumps(config(r="8")),
        json.dumps(config(r=True)),
        json.dumps(config(lora_alpha=None)),
        json.dumps(config(lora_alpha=float("nan"))),
        json.dumps(config(lora_alpha=0)),
        json.dumps(config(rank_pattern=[1])),
        json.dumps(config(rank_pattern={"a": "b"})),
        json.dumps(config(alpha_pattern={"a[": 1})),
    ],
)
def test_a_config_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    write_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    assert _refusal(tmp_path).code == "adapter-config"


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_that_lacks_a_file_is_no_adapter(tmp_path: Path, name: str) -> None:
    (write_adapter(tmp_path) / name).unlink()
    error = _refusal(tmp_path)
    assert error.code == "adapter-missing"
    assert name in error.what
    assert _refusal(tmp_path / "nowhere").code == "adapter-missing"


def _header(**entries: Any) -> bytes:
    raw = json.dumps(entries).encode()
    return struct.pack("<Q", len(raw)) + raw


def _one(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8], **changes}


BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "cut short"),
    "no header": (lambda: struct.pack("<Q", 100) + b"{}", "cut short"),
    "long header": (lambda: struct.pack("<Q", 40_000_000) + b" " * 40_000_000, "is longer than"),
    "no json": (lambda: struct.pack("<Q", 4) + b"oops", "no JSON"),
    "deep json": (lambda: struct.pack("<Q", 100_000) + b"[" * 100_000, "no JSON"),
    "a list": (lambda: struct.pack("<Q", 2) + b"[]", "no JSON object"),
    "twice": (lambda: struct.pack("<Q", 13) + b'{"a":1,"a":1}', "a name occurs twice"),
    "malformed": (lambda: _header(a={"dtype": "F32"}), "is malformed"),
    "pickled type": (lambda: _header(a=_one(dtype="OBJECT")) + bytes(8), "is of type 'OBJECT'"),
    "type no text": (lambda: _header(a=_one(dtype=None)) + bytes(8), "is of type None"),
    "negative": (lambda: _header(a=_one(shape=[-1, -2])) + bytes(8), "has the shape [-1, -2]"),
    "truth": (lambda: _header(a=_one(shape=[True, 2])) + bytes(8), "has the shape [True, 2]"),
    "huge": (lambda: _header(a=_one(shape=[2**40, 2**40])) + bytes(8), "does not fill its bytes"),
    "offsets": (lambda: _header(a=_one(data_offsets=[0])) + bytes(8), "has the offsets [0]"),
    "backwards": (lambda: _header(a=_one(data_offsets=[8, 0])) + bytes(8), "does not fill its bytes"),
    "truncated": (lambda: _header(a=_one()) + bytes(7), "cut short"),
    "appended": (lambda: _header(a=_one()) + bytes(9), "1 bytes at its end belong to no tensor"),
    "hole": (lambda: _header(a=_one(data_offsets=[4, 12])) + bytes(12), "does not begin where"),
    "overlap": (lambda: _header(a=_one(), b=_one()) + bytes(8), "does not begin where"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_p14_a_broken_safetensors_file_is_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    make, words = BROKEN[case]
    write_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(make())
    error = _refusal(tmp_path)
    assert error.code == "adapter-tensors"
    assert words in error.what


def test_every_cut_of_a_whole_file_is_refused(tmp_path: Path) -> None:
    data = (write_adapter(tmp_path) / "adapter_model.safetensors").read_bytes()
    for cut in range(0, len(data), 97):
        (tmp_path / "adapter_model.safetensors").write_bytes(data[:cut])
        assert _refusal(tmp_path).code == "adapter-tensors"


@hypothesis_settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_p35_no_bytes_in_the_header_make_the_reader_do_anything_but_refuse(tmp_path: Path, data: st.DataObject) -> None:
    path = write_adapter(tmp_path) / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    length = struct.unpack("<Q", raw[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 8 + length - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        check_adapter(tmp_path)
    except AdapterError as error:
        assert error.code in {"adapter-tensors", "adapter-not-finite"}


def test_the_header_agrees_with_the_reference_reader(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones((1,), np.float16)}, path, {"k": "v"})
    raw, facts = path.read_bytes(), read_header(path)
    for name, array in load_file(path).items():
        assert facts[name].shape == array.shape
        assert raw[facts[name].start : facts[name].stop] == array.tobytes()
