"""What people write stays text: a message that spells a control token does not become one.

Such spellings are hidden from the chat template behind characters of a private plane and come back as text, while the
control tokens that the template itself writes are encoded as tokens. Conversations that spell none (nearly all) take
the ordinary way, so their ids are the ordinary ones. This module does not know templates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from tenon.data.tokenizer import ChatTokenizer
from tenon.errors import DataError

# Private characters: for what people spelt, and for what the template writes.
_SPELT, _WRITTEN, _ROOM = 0x10C000, 0x10E000, 0x1000
_PRIVATE = re.compile(f"[{chr(_SPELT)}-{chr(_SPELT + _ROOM - 1)}{chr(_WRITTEN)}-{chr(_WRITTEN + _ROOM - 1)}]")


class Literals:
    """The control tokens of one tokenizer, as people may spell them."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        special = [(index, token.content) for index, token in sorted(tokenizer.added_tokens.items()) if token.special]
        self._ids, self._texts = [index for index, _ in special], [text for _, text in special]
        self._number = {text: number for number, text in enumerate(self._texts)}
        longest_first = sorted((text for text in self._texts if text), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def spelt_in(self, *trees: Any) -> bool:
        """Whether a string anywhere in these JSON values spells a control token."""
        return self._pattern is not None and any(self._pattern.search(text) for text in _strings(list(trees)))

    def hide(self, tree: Any) -> Any:
        """The JSON value with a private character for each spelling."""
        if isinstance(tree, str):
            return self._swap(tree, _SPELT)
        if isinstance(tree, dict):
            return {self._swap(key, _SPELT): self.hide(value) for key, value in tree.items()}
        return [self.hide(item) for item in tree] if isinstance(tree, list | tuple) else tree

    def encode_opening(self, text: str, source: str) -> list[int]:
        """`ChatTokenizer.encode_opening` of a rendered text whose spellings are hidden.

        Raises DataError data-control-text where even so a control token would come of them.
        """
        if len(self._ids) > _ROOM:
            raise _refused(source)
        written = self._swap(text, _WRITTEN)
        shown = _PRIVATE.sub(lambda match: self._shown(match[0]), written)
        ids = self._plain.encode_opening(shown)
        if any(index in self._tokenizer.special_ids for index in ids):
            raise _refused(source)
        return [self._of_plain.get(index, index) for index in ids]

    def require_none_private(self, *trees: Any) -> None:
        """Raises DataError data-control-text for conversations that hold the private characters themselves."""
        if any(_PRIVATE.search(text) for text in _strings(list(trees))):
            raise _refused("the conversation")

    def _swap(self, text: str, plane: int) -> str:
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda match: chr(plane + self._number[match[0]]), text)

    def _shown(self, letter: str) -> str:
        """The spelling behind a private character; characters of written tokens stay."""
        code = ord(letter)
        return self._texts[code - _SPELT] if _SPELT <= code < _SPELT + _ROOM else letter

    @cached_property
    def _plain(self) -> ChatTokenizer:
        """The same tokenizer, which knows control tokens by their private characters alone."""
        tree = json.loads(self._tokenizer.backend.to_str())
        for token in tree["added_tokens"]:
            if token["special"]:
                token |= {"content": chr(_WRITTEN + self._number[token["content"]]), "special": False}
        return replace(self._tokenizer, backend=Tokenizer.from_str(json.dumps(tree)))

    @cached_property
    def _of_plain(self) -> dict[int, int]:
        """From the ids that private characters have there to those of the tokens."""
        found = {self._plain.token_id(chr(_WRITTEN + number)): index for number, index in enumerate(self._ids)}
        return {index: own for index, own in found.items() if index is not None}


def _strings(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict):
        yield from (str(key) for key in tree)
        yield from (text for value in tree.values() for text in _strings(value))
    elif isinstance(tree, Sequence):
        yield from (text for item in tree for text in _strings(item))


def _refused(source: str) -> DataError:
    return DataError(
        "data-control-text",
        f"{source}: a message spells a control token of the base, and it cannot be encoded as plain text",
        hint="write the control token in another way, with a space in it for instance",
    )
