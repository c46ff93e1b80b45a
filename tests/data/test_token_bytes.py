"""The bytes of tokens: what the tokenizer's own decoder writes, for every token of every kind of vocabulary."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models

from tenon.data.token_bytes import token_bytes
from tenon.data.tokenizer import ChatTokenizer
from tenon.errors import BaseModelError

KINDS = ["byte", "metaspace", "smollm"]


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_tokens_joined_are_the_text(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: ChatTokenizer = request.getfixturevalue(f"{kind}_tokenizer")
    known = token_bytes(tokenizer)
    assert len(known) == tokenizer.vocabulary
    for text in ("the house at the lake", "naïve 你好 🚀👩‍👩‍👧\n\ttab  two", '{"a": [1, 2.5, null]}', "x = 'y'\r\n"):
        ids = tokenizer.encode(text)
        assert b"".join(known[i] for i in ids).decode().removeprefix(" ") == text.removeprefix(" ")


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_has_the_bytes_that_the_decoder_writes(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: ChatTokenizer = request.getfixturevalue(f"{kind}_tokenizer")
    known = token_bytes(tokenizer)
    before = tokenizer.encode("a")[-1:]
    skip = len(tokenizer.decode(before))
    every = list(range(tokenizer.vocabulary))
    for index in every if len(every) < 5000 else random.Random(0).sample(every, 5000):
        said = tokenizer.decode([*before, index], keep_special=True)[skip:]
        if "\ufffd" not in said:  # a whole character or more
            assert known[index].decode() == said, index
        else:
            assert known[index].decode(errors="replace").count("\ufffd") >= 1, index
    whole = [index for index in every if "\ufffd" not in known[index].decode(errors="replace")]
    drawn = random.Random(1)
    for _ in range(300):
        ids = [*before, *drawn.sample(whole, 12)]
        said = tokenizer.decode(ids, keep_special=True)
        assert said.removeprefix(" ") == b"".join(known[i] for i in ids).decode().removeprefix(" ")


def test_a_vocabulary_of_another_kind_is_refused(byte_tokenizer: ChatTokenizer) -> None:
    strange = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))  # pyright: ignore[reportCallIssue]
    strange.decoder = decoders.WordPiece()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(BaseModelError, match="base-tokenizer-kind"):
        token_bytes(ChatTokenizer(byte_tokenizer.folder, {}, {}, frozenset(), False, "", strange))
