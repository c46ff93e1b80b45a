"""The bytes of every token of a tokenizer, as a grammar has to see them: half characters, spaces and all.

Two kinds of vocabularies are known: byte-level ones (GPT-2's: each byte has a letter), and sentencepiece's (a mark for
the space, `<0x0A>` for single bytes). This module does not know grammars.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tenon.data.tokenizer import ChatTokenizer
from tenon.errors import BaseModelError

_SPACE = "\u2581"
_SINGLE_BYTE = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")


def token_bytes(tokenizer: ChatTokenizer) -> list[bytes]:
    """What each id writes into a text, by its id; empty for ids that stand for nothing.

    Added tokens, special ones among them, are given as they are spelt.
    Raises BaseModelError base-tokenizer-kind when the vocabulary is of another kind.
    """
    decoder = json.loads(tokenizer.backend.to_str()).get("decoder")
    kinds = _kinds(decoder)
    added = tokenizer.added_tokens
    letters = _byte_of_letter()
    if "ByteLevel" in kinds:
        read = letters
    elif kinds & {"Metaspace", "ByteFallback"}:
        read = None
    else:
        raise BaseModelError(
            "base-tokenizer-kind",
            "the bytes of this base's tokens are not known, so its answers cannot be held to a grammar",
            got=f"a decoder of {', '.join(sorted(kinds)) or 'no kind'}",
            hint="ask without response_format and without enforced tools, or serve another base",
        )
    found: list[bytes] = []
    for index in range(tokenizer.vocabulary):
        piece = tokenizer.backend.id_to_token(index)
        if piece is None:
            found.append(b"")
        elif index in added:
            found.append(added[index].content.encode())
        else:
            found.append(_of_letters(piece, letters) if read is not None else _of_piece(piece))
    return found


def _of_letters(piece: str, letters: dict[str, int]) -> bytes:
    """A byte-level token; one that holds other letters is never made by the vocabulary, and is taken as it is spelt."""
    if all(letter in letters for letter in piece):
        return bytes(letters[letter] for letter in piece)
    return piece.encode()


def _of_piece(piece: str) -> bytes:
    single = _SINGLE_BYTE.match(piece)
    return bytes([int(single[1], 16)]) if single else piece.replace(_SPACE, " ").encode()


def _kinds(decoder: Any) -> set[str]:
    """The kinds of a decoder and of its parts."""
    if not isinstance(decoder, dict):
        return set()
    return {str(decoder.get("type"))}.union(*(_kinds(part) for part in decoder.get("decoders", ())))


def _byte_of_letter() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are their own letters, the others get letters from U+0100 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return letters | {chr(256 + number): byte for number, byte in enumerate(others)}
