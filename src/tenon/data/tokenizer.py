"""Text to token ids and back, from an HF-style folder, with nothing but the `tokenizers` library.

The truth is `tokenizer.json`; `tokenizer_config.json`, `special_tokens_map.json` and the chat template files add names
of special tokens and templates, read by the same rules as transformers reads them. No torch and no transformers here:
a worker process that only tokenises starts in a fraction of a second. This module does not render chats and knows no
loss mask.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from tokenizers import AddedToken, Encoding, Tokenizer

from tenon.errors import BaseModelError
from tenon.values import canonical_json

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
DEFAULT_TEMPLATE = "default"
TOOL_TEMPLATE = "tool_use"
UNFINISHED = "\ufffd"


@dataclass(frozen=True, slots=True)
class Encoded:
    """Ids of one text with the character at which each token starts and ends (untrimmed: spaces belong to tokens)."""

    ids: list[int]
    starts: list[int]
    ends: list[int]

    def first_from(self, char: int) -> int:
        """Index of the first token that starts at or after the character; the number of tokens when none does."""
        return bisect_left(self.starts, char)


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer with the names of its special tokens and its chat templates.

    named_tokens: `bos_token`, `eos_token`, … -> text, as chat templates see them. templates: name -> Jinja source;
    the name `default` is the one for ordinary chats. declared_stop_ids: what the generation config calls
    end-of-sequence. adds_bos: whether plain text gets the BOS in front (the tokenizer's own post-processor).
    """

    folder: Path
    named_tokens: Mapping[str, str]
    templates: Mapping[str, str]
    declared_stop_ids: frozenset[int]
    adds_bos: bool
    content_hash: str
    backend: Tokenizer = field(repr=False)

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning-of-sequence token, if there is one."""
        return self.named_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        """Id of the end-of-sequence token: the tokenizer's, else the lowest that the generation config declares."""
        own = self.named_id("eos_token")
        return own if own is not None or not self.declared_stop_ids else min(self.declared_stop_ids)

    @property
    def pad_id(self) -> int | None:
        """Id of the padding token, if there is one. Tenon packs and never pads."""
        return self.named_id("pad_token")

    @property
    def vocabulary(self) -> int:
        """Number of ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def chat_template(self) -> str | None:
        """The template for ordinary chats, if the base has one."""
        return self.templates.get(DEFAULT_TEMPLATE)

    @property
    def added_tokens(self) -> dict[int, AddedToken]:
        """Every token that is matched as a whole before the vocabulary applies: id -> token."""
        return self.backend.get_added_tokens_decoder()

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that carry structure and not text: what `decode` leaves out."""
        return frozenset(index for index, token in self.added_tokens.items() if token.special)

    def named_id(self, name: str) -> int | None:
        """Id of a named special token such as `eos_token`."""
        text = self.named_tokens.get(name)
        return None if text is None else self.token_id(text)

    def token_id(self, text: str) -> int | None:
        """Id of a token by its exact text, or None."""
        return self.backend.token_to_id(text)

    def encode(self, text: str) -> list[int]:
        """Ids of a text as it stands: no BOS and no EOS is added; special tokens in the text become their ids."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> Encoded:
        """Ids of a text with each token's characters."""
        return _encoded(self.backend.encode(text, add_special_tokens=False))

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """`encode_with_offsets` of several texts at once; the library may use several threads."""
        return [_encoded(one) for one in self.backend.encode_batch(list(texts), add_special_tokens=False)]

    def encode_opening(self, text: str) -> list[int]:
        """Ids of a text as they stand when a word follows it.

        Some vocabularies split the spaces at the end of a text differently when nothing follows.
        """
        whole = self.encode_with_offsets(text + "a")
        count = whole.first_from(len(text))
        clean = count > 0 and whole.ends[count - 1] <= len(text)
        return whole.ids[:count] if clean else self.encode(text)

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that goes on where another ended: no space is put before its first word."""
        anchor = self.encode("\n")
        ids = self.encode("\n" + text)
        return ids[len(anchor) :] if anchor and ids[: len(anchor)] == anchor else self.encode(text)

    def decode(self, ids: Iterable[int], *, keep_special: bool = False) -> str:
        """Text of ids; special tokens are left out unless they are asked for."""
        return self.backend.decode(list(ids), skip_special_tokens=not keep_special)

    def stream(self, *, keep_special: bool = False, shown: frozenset[int] = frozenset()) -> StreamDecoder:
        """A decoder for ids that arrive one by one. shown: special tokens that are kept although others are not."""
        return StreamDecoder(self, keep_special=keep_special, shown=shown)


class StreamDecoder:
    """Text of ids that arrive one by one; never half of a character.

    The pieces that `push` and `finish` return, joined, are the text of all ids. Text is held back while it ends in an
    unfinished character, so a character of several tokens appears when its last token has come.
    """

    def __init__(
        self, tokenizer: ChatTokenizer, *, keep_special: bool = False, shown: frozenset[int] = frozenset()
    ) -> None:
        self._tokenizer = tokenizer
        # Those that are not shown never come to the decoder where some are.
        self._keep_special = keep_special or bool(shown)
        self._hidden = tokenizer.special_ids - shown if shown and not keep_special else frozenset()
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """What can be shown now that this id has come; often empty for one part of a character."""
        if token_id in self._hidden:
            return ""
        self._pending.append(token_id)
        text = self._fresh_text()
        if not text or text.endswith(UNFINISHED):
            return ""
        self._settle()
        return text

    def finish(self) -> str:
        """What was held back, with a replacement character for bytes that never became one."""
        text = self._fresh_text()
        self._settle()
        return text

    def _settle(self) -> None:
        # Decoders drop the leading space of a text's first token, so the tokens shown last stay as context.
        self._context = self._pending
        self._pending = []

    def _fresh_text(self) -> str:
        shown = self._tokenizer.decode(self._context, keep_special=self._keep_special)
        text = self._tokenizer.decode(self._context + self._pending, keep_special=self._keep_special)
        return text[len(shown) :]


def load_tokenizer(folder: Path) -> ChatTokenizer:
    """The tokenizer of an HF-style folder.

    Raises BaseModelError: base-tokenizer-missing without tokenizer.json, base-tokenizer-damaged when a file of the
    tokenizer cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise BaseModelError(
            "base-tokenizer-missing",
            f"{folder}: there is no tokenizer.json",
            got=_present(folder),
            hint="name a base that has one, or save one there with transformers: "
            "AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)",
        )
    # The library raises bare Exception for every file that it cannot read; nothing narrower can be caught.
    try:
        backend = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:
        raise _damaged(path, error) from error
    config = _read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= _read_json(folder / "special_tokens_map.json")
    _add_missing_tokens(backend, config)
    backend.no_truncation()
    backend.no_padding()
    named = _named_tokens(config)
    templates = _read_templates(folder, config)
    adds_bos = _adds_bos(backend, named.get("bos_token"))
    # Without it offsets stay untrimmed: a space belongs to the token that holds it, which the loss mask depends on.
    backend.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]  # the stub forgets that None is allowed
    stops = _declared_stops(folder)
    return ChatTokenizer(
        folder=folder,
        named_tokens=named,
        templates=templates,
        declared_stop_ids=stops,
        adds_bos=adds_bos,
        content_hash=_content_hash(path, {"named": named, "templates": templates, "stops": sorted(stops)}),
        backend=backend,
    )


def _encoded(encoding: Encoding) -> Encoded:
    offsets = encoding.offsets
    return Encoded(encoding.ids, [start for start, _ in offsets], [end for _, end in offsets])


def _present(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    names = sorted(path.name for path in folder.iterdir() if "token" in path.name)
    return ", ".join(names) or "no tokenizer file at all"


def _damaged(path: Path, error: Exception) -> BaseModelError:
    return BaseModelError(
        "base-tokenizer-damaged",
        f"{path}: the file cannot be read: {error}",
        hint="fetch the base again, or save its tokenizer with a current version of transformers",
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        tree = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise _damaged(path, error) from error
    if not isinstance(tree, dict):
        raise _damaged(path, TypeError(f"a JSON object is expected, not {type(tree).__name__}"))
    return tree


def _token_text(value: Any) -> str | None:
    """Config files write a token as its text or as an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Every `…_token` of the config, and the named extra tokens of newer configs, by name."""
    found = {key: _token_text(value) for key, value in config.items() if key.endswith("_token")}
    extra = config.get("extra_special_tokens")
    if isinstance(extra, dict):
        found |= {str(key): _token_text(value) for key, value in extra.items()}
    return {key: text for key, text in sorted(found.items()) if text is not None}


def _add_missing_tokens(backend: Tokenizer, config: dict[str, Any]) -> None:
    """Tokens that only the config knows become added tokens, in the order of their ids."""
    declared = config.get("added_tokens_decoder")
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    if isinstance(declared, dict):
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        for _, entry in sorted(declared.items(), key=lambda item: int(item[0])):
            if entry["content"] not in known:
                given = {name: bool(entry[name]) for name in flags if name in entry}
                backend.add_tokens([AddedToken(entry["content"], **given)])
                known.add(entry["content"])
    listed = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    extra = listed.values() if isinstance(listed, dict) else listed
    for text in [*_named_tokens(config).values(), *map(_token_text, extra)]:
        if text and text not in known:
            backend.add_special_tokens([AddedToken(text, special=True)])
            known.add(text)


def _adds_bos(backend: Tokenizer, bos: str | None) -> bool:
    if bos is None:
        return False
    ids = backend.encode("a", add_special_tokens=True).ids
    return bool(ids) and ids[0] == backend.token_to_id(bos)


def _read_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Files of their own come before entries of the config, as in transformers."""
    found: dict[str, str] = {}
    if (folder / TEMPLATE_FILE).is_file():
        found[DEFAULT_TEMPLATE] = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja")):
        found[path.stem] = path.read_text(encoding="utf-8")
    if found:
        return found
    listed = config.get("chat_template")
    if isinstance(listed, str):
        return {DEFAULT_TEMPLATE: listed}
    if isinstance(listed, dict):
        return {str(name): str(text) for name, text in listed.items()}
    return {entry["name"]: entry["template"] for entry in listed or ()}


def _declared_stops(folder: Path) -> frozenset[int]:
    declared = _read_json(folder / "generation_config.json").get("eos_token_id")
    if declared is None:
        declared = _read_json(folder / "config.json").get("eos_token_id")
    listed = declared if isinstance(declared, list) else [declared]
    return frozenset(index for index in listed if isinstance(index, int))


def _content_hash(path: Path, rest: dict[str, Any]) -> str:
    digest = hashlib.sha256(path.read_bytes())
    digest.update(canonical_json(rest).encode())
    return digest.hexdigest()
