"""Tokenizer folders: ids, offsets and special tokens as transformers has them, streaming, and what is refused."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tenon.data.tokenizer import ChatTokenizer, load_tokenizer
from tenon.errors import BaseModelError
from tests.data.chats import CHATML, MARKED, save_byte_tokenizer, save_metaspace_tokenizer

PROPERTY = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
PIECES = (*"abc the 12\n\t é你好世界🙂🚀👩\u200d👧", "<|im_end|>", "</s>", "<think>")
TEXTS = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)


@pytest.mark.parametrize("kind", ["byte", "metaspace", "smollm"])
@given(text=TEXTS)
@PROPERTY
def test_ids_and_text_equal_transformers(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer: ChatTokenizer = request.getfixturevalue(f"{kind}_tokenizer")
    oracle = _kept_oracle(request.getfixturevalue(f"{kind}_folder"))
    ids = tokenizer.encode(text)
    assert ids == oracle.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, keep_special=True) == oracle.decode(ids)
    assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["byte", "metaspace", "smollm"])
@given(text=TEXTS)
@PROPERTY
def test_offsets_cover_the_text_in_order(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer: ChatTokenizer = request.getfixturevalue(f"{kind}_tokenizer")
    encoded = tokenizer.encode_with_offsets(text)
    assert encoded.ids == tokenizer.encode(text)
    assert encoded.starts == sorted(encoded.starts)
    assert encoded.ends == sorted(encoded.ends)
    if text:
        assert encoded.starts[0] == 0
        assert encoded.ends[-1] == len(text)
        gaps = [(end, start) for end, start in zip(encoded.ends, encoded.starts[1:], strict=False) if start > end]
        assert not gaps, "spaces belong to tokens: nothing lies between them"
    assert tokenizer.encode_batch([text, "x"]) == [encoded, tokenizer.encode_with_offsets("x")]


@pytest.mark.parametrize("kind", ["byte", "metaspace", "smollm"])
@pytest.mark.parametrize("keep_special", [True, False])
@given(text=TEXTS)
@PROPERTY
def test_streamed_pieces_join_to_the_text(
    kind: str, keep_special: bool, text: str, request: pytest.FixtureRequest
) -> None:
    tokenizer: ChatTokenizer = request.getfixturevalue(f"{kind}_tokenizer")
    ids = tokenizer.encode(text)
    stream = tokenizer.stream(keep_special=keep_special)
    pieces = [stream.push(token_id) for token_id in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids, keep_special=keep_special)


def test_streaming_shows_a_character_when_its_last_token_has_come(byte_tokenizer: ChatTokenizer) -> None:
    ids = byte_tokenizer.encode("🚀")
    assert len(ids) > 1
    stream = byte_tokenizer.stream()
    assert [stream.push(token_id) for token_id in ids] == [""] * (len(ids) - 1) + ["🚀"]
    assert stream.finish() == ""
    broken = byte_tokenizer.stream()
    assert broken.push(ids[0]) == ""
    assert broken.finish() == "\ufffd"


def test_named_tokens(byte_folder: Path, byte_tokenizer: ChatTokenizer) -> None:
    oracle = _oracle(byte_folder)
    assert (byte_tokenizer.bos_id, byte_tokenizer.eos_id) == (oracle.bos_token_id, oracle.eos_token_id)
    assert byte_tokenizer.pad_id == oracle.pad_token_id
    assert byte_tokenizer.named_tokens == oracle.special_tokens_map
    assert byte_tokenizer.vocabulary == len(oracle)
    assert byte_tokenizer.adds_bos
    assert set(oracle.all_special_ids) <= byte_tokenizer.special_ids
    assert byte_tokenizer.token_id("<think>") not in byte_tokenizer.special_ids


def test_tokens_that_only_the_config_knows(tmp_path: Path) -> None:
    added = {"900": {"content": "<late>", "special": True}, "800": {"content": "<early>", "special": False}}
    folder = save_byte_tokenizer(
        tmp_path, added_tokens_decoder=added, sep_token={"__type": "AddedToken", "content": "<sep>"}, eos_token="<fin>"
    )
    ours, oracle = load_tokenizer(folder), _oracle(folder)
    text = "a<late>b<early>c<fin>"
    assert ours.encode(text) == oracle.encode(text, add_special_tokens=False)
    assert ours.eos_id == oracle.eos_token_id


def test_the_special_tokens_map_of_older_folders(tmp_path: Path) -> None:
    folder = save_byte_tokenizer(tmp_path)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|eot|>"}}), encoding="utf-8")
    assert load_tokenizer(folder).named_tokens["eos_token"] == "<|eot|>"
    assert _oracle(folder).eos_token == "<|eot|>"


def test_stops_that_the_base_declares(tmp_path: Path) -> None:
    folder = save_byte_tokenizer(tmp_path, eos_token=None)
    assert load_tokenizer(folder).eos_id is None
    (folder / "config.json").write_text('{"eos_token_id": 5}', encoding="utf-8")
    assert load_tokenizer(folder).declared_stop_ids == {5}
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 3]}', encoding="utf-8")
    assert load_tokenizer(folder).declared_stop_ids == {3, 7}
    assert load_tokenizer(folder).eos_id == 3


def test_where_templates_are_found(tmp_path: Path) -> None:
    plain = save_byte_tokenizer(tmp_path / "a", chat_template=CHATML)
    assert load_tokenizer(plain).templates == {"default": CHATML}
    listed = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": MARKED}]
    named = save_byte_tokenizer(tmp_path / "b", chat_template=listed)
    assert load_tokenizer(named).templates == {"default": CHATML, "tool_use": MARKED}
    (named / "chat_template.jinja").write_text("file", encoding="utf-8")
    assert load_tokenizer(named).chat_template == "file"
    (named / "additional_chat_templates").mkdir()
    (named / "additional_chat_templates" / "tool_use.jinja").write_text("tools", encoding="utf-8")
    assert load_tokenizer(named).templates == {"default": "file", "tool_use": "tools"} == _oracle(named).chat_template
    assert load_tokenizer(save_byte_tokenizer(tmp_path / "c")).chat_template is None


def test_content_hash_follows_the_contents(tmp_path: Path) -> None:
    one = load_tokenizer(save_byte_tokenizer(tmp_path / "a"))
    same = load_tokenizer(save_byte_tokenizer(tmp_path / "b"))
    other_eos = load_tokenizer(save_byte_tokenizer(tmp_path / "c", eos_token="<|eot|>"))
    other_template = load_tokenizer(save_byte_tokenizer(tmp_path / "d", chat_template="x"))
    other_vocabulary = load_tokenizer(save_metaspace_tokenizer(tmp_path / "e"))
    assert one.content_hash == same.content_hash
    hashes = {each.content_hash for each in (one, other_eos, other_template, other_vocabulary)}
    assert len(hashes) == 4


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    folder = save_byte_tokenizer(tmp_path)
    tree = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tree["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (folder / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    assert len(load_tokenizer(folder).encode("a b c d e f")) > 3


def test_continuation_gets_no_leading_space(metaspace_tokenizer: ChatTokenizer, byte_tokenizer: ChatTokenizer) -> None:
    for tokenizer in (metaspace_tokenizer, byte_tokenizer):
        ids = tokenizer.encode("the qui") + tokenizer.encode_continuation("ck fox")
        assert tokenizer.decode(ids) == "the quick fox"


def test_opening_ends_as_it_does_before_a_word(byte_tokenizer: ChatTokenizer) -> None:
    text = "x<|/head|>\n\n"
    opening = byte_tokenizer.encode_opening(text)
    assert opening == byte_tokenizer.encode(text + "word")[: len(opening)]
    assert byte_tokenizer.decode(opening, keep_special=True) == text
    # A word that joins the last token cannot tell how the text ends.
    assert byte_tokenizer.encode_opening("dogs") == byte_tokenizer.encode("dogs")
    assert byte_tokenizer.encode_opening("") == []


def test_it_pickles(byte_tokenizer: ChatTokenizer) -> None:
    again = pickle.loads(pickle.dumps(byte_tokenizer))
    assert again.encode("the fox</s>") == byte_tokenizer.encode("the fox</s>")
    assert again.content_hash == byte_tokenizer.content_hash


def test_a_folder_without_tokenizer_json(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(BaseModelError, match=r"tokenizer\.json") as raised:
        load_tokenizer(tmp_path)
    assert raised.value.code == "base-tokenizer-missing"
    assert raised.value.got == "tokenizer.model"
    assert "save_pretrained" in raised.value.hint
    with pytest.raises(BaseModelError) as raised:
        load_tokenizer(tmp_path / "nowhere")
    assert raised.value.got == "no such folder"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_tokenizer(name: str, content: str, tmp_path: Path) -> None:
    folder = save_byte_tokenizer(tmp_path)
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(BaseModelError) as raised:
        load_tokenizer(folder)
    assert raised.value.code == "base-tokenizer-damaged"
    assert name in raised.value.what


def test_p30_a_tokenising_worker_imports_no_heavy_library() -> None:
    code = "import sys, tenon.data.render; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@cache
def _kept_oracle(folder: Path) -> PreTrainedTokenizerFast:
    return _oracle(folder)


def _oracle(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(str(folder))
