"""Tokens of texts and conversations over HTTP: what the answers' prompts are made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from tenon.data.rows import Completion
from tenon.serve.front.access import Access
from tenon.tenants.keys import KeyStore
from tenon.tenants.usage import UsageBook
from tests.serve.house import CONTEXT, House, Running, serving

TALK = [{"role": "user", "content": "the house"}, {"role": "assistant", "content": "at the lake"}]


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_a_text_goes_to_tokens_and_back(house: House, running: Running, prefix: str) -> None:
    text = "the house at the lake — 你好"
    status, found = running.ask(f"{prefix}/tokenize", {"model": "low", "prompt": text, "return_token_strs": True})
    ids = house.renderer.prompt_of(Completion(text, "", "test"))
    assert status == 200 and found["tokens"] == ids
    assert (found["count"], found["max_model_len"]) == (len(ids), CONTEXT)
    assert found["token_strs"] == [house.renderer.tokenizer.backend.id_to_token(i) for i in ids]
    bare = running.ask(f"{prefix}/tokenize", {"prompt": text, "add_special_tokens": False})[1]
    assert bare["tokens"] == house.renderer.tokenizer.encode(text) and bare["token_strs"] is None
    assert running.ask(f"{prefix}/detokenize", {"model": "base", "tokens": bare["tokens"]}) == (200, {"prompt": text})
    assert running.ask(f"{prefix}/detokenize", {"tokens": []}) == (200, {"prompt": ""})


def test_a_conversation_is_what_a_chat_is_asked(house: House, running: Running) -> None:
    talk = TALK[:1]
    found = running.ask("/tokenize", {"model": "low", "messages": talk})[1]
    assert found["tokens"] == house.renderer.prompt([{"role": "user", "content": "the house"}])
    chat = {"model": "low", "messages": talk, "max_tokens": 1}
    assert running.ask("/v1/chat/completions", chat)[1]["usage"]["prompt_tokens"] == found["count"]
    closed = running.ask("/tokenize", {"messages": TALK, "add_generation_prompt": False})[1]["tokens"]
    text = running.ask("/detokenize", {"tokens": closed})[1]["prompt"]
    assert text.endswith(house.renderer.tokenizer.decode(closed[-1:], keep_special=True)) and "at the lake" in text
    opened = running.ask("/tokenize", {"messages": TALK})[1]["tokens"]
    assert opened[: len(closed)] == closed and len(opened) > len(closed)


def test_an_adapter_is_asked_with_its_own_system_message(house: House, running: Running) -> None:
    house.register("polite", rank=2, seed=70, system="the weather")
    own = running.ask("/tokenize", {"model": "polite", "messages": TALK[:1]})[1]
    base = running.ask("/tokenize", {"model": "base", "messages": TALK[:1]})[1]
    assert own["count"] > base["count"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": "x", "messages": TALK},
        {"messages": []},
        {"messages": TALK, "add_special_tokens": True},
        {"prompt": "x", "tools": []},
        {"prompt": "\ud800"},
        {"prompt": "x", "surprise": 1},
        {"prompt": 5},
    ],
)
def test_what_has_no_tokens_is_refused(running: Running, body: dict[str, object]) -> None:
    status, found = running.ask("/tokenize", body)
    assert status == 400 and found["error"]["message"], found


@pytest.mark.parametrize("tokens", [[-1], [288], ["x"], None, [2**70], [True]])
def test_ids_that_are_none_are_refused(running: Running, tokens: object) -> None:
    status, found = running.ask("/detokenize", {"tokens": tokens})
    assert status == 400 and found["error"]["param"].startswith("tokens"), found
    assert running.ask("/detokenize", {"model": "nobody", "tokens": [1]})[0] == 404


def test_names_need_a_right(house: House, tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.json")
    typed, _ = store.create("acme", rights=("low",))
    with serving(house, access=Access(store, UsageBook(tmp_path / "usage.db"))) as running:
        assert running.ask("/tokenize", {"prompt": "x"})[0] == 401
        for body, status in (({"prompt": "x", "model": "low"}, 200), ({"prompt": "x"}, 403)):
            assert running.ask("/tokenize", body, key=typed)[0] == status


def test_the_special_tokens_are_told(house: House, running: Running) -> None:
    tokenizer = house.renderer.tokenizer
    for path in ("/tokenizer_info", "/v1/tokenizer_info"):
        status, found = running.ask(path)
        assert status == 200 and found["eos_token"] == tokenizer.named_tokens["eos_token"]
        assert found["chat_template"] == tokenizer.chat_template and found["pad_token"] is None
