"""The tokenizer of a GGUF base as tokenizer.json and tokenizer_config.json.

A GGUF file holds the vocabulary, the merges and a name for how text is cut before merging (`tokenizer.ggml.pre`). What
the name stands for is in the table below; an unknown name is refused, because a wrong cut gives other tokens than those
that the base was trained on. This module does not know rows or templates: the chat template is copied as it is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from tenon.bases.gguf_header import GgufHeader
from tenon.errors import BaseModelError

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Cut:
    """How text is cut into words before merging.

    pattern: None for GPT-2's own. digits: every digit by itself. nfc: text is composed first. whole_words: a word that
    is in the vocabulary is taken as it is, without merging.
    """

    pattern: str | None = None
    digits: bool = False
    nfc: bool = False
    whole_words: bool = False


_CUTS: dict[str, _Cut] = {
    "gpt-2": _Cut(),
    "smollm": _Cut(digits=True),
    "llama-bpe": _Cut(pattern=_LLAMA3, whole_words=True),
    "llama3": _Cut(pattern=_LLAMA3, whole_words=True),
    "llama-v3": _Cut(pattern=_LLAMA3, whole_words=True),
    "smaug-bpe": _Cut(pattern=_LLAMA3),
    "tekken": _Cut(pattern=_TEKKEN, whole_words=True),
    "qwen2": _Cut(pattern=_QWEN2, nfc=True),
    "deepseek-r1-qwen": _Cut(pattern=_QWEN2, nfc=True),
}


def write_tokenizer(header: GgufHeader, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into a folder.

    Raises: BaseModelError base-tokenizer (a kind of tokenizer or cut that is not known, or an incomplete vocabulary).
    """
    tokens = _strings(header, "tokenizer.ggml.tokens")
    kind = header.text("tokenizer.ggml.model", "nothing")
    if kind == "gpt2":
        tokenizer = _byte_level(header, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece(header, tokens)
    else:
        _refuse(header, "tokenizer.ggml.model", kind, "gpt2, llama")
    types = header.arrays.get("tokenizer.ggml.token_type", ())
    for token, token_type in zip(tokens, types, strict=False):
        if token_type in (_CONTROL, _USER_DEFINED):
            special = token_type == _CONTROL
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=special)])
    names = {name: _token(header, tokens, name) for name in ("bos", "eos", "unknown", "padding")}
    add_bos = bool(header.values.get("tokenizer.ggml.add_bos_token", kind == "llama"))
    if add_bos and names["bos"] is not None:
        bos = names["bos"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokens.index(bos))]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    tree: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "bos_token": names["bos"],
        "eos_token": names["eos"],
        "unk_token": names["unknown"],
        "pad_token": names["padding"],
        "clean_up_tokenization_spaces": False,
    }
    if "tokenizer.chat_template" in header.values:
        tree["chat_template"] = header.text("tokenizer.chat_template")
    (folder / "tokenizer_config.json").write_text(json.dumps(tree, indent=2, ensure_ascii=False), "utf-8")


def _byte_level(header: GgufHeader, tokens: list[str]) -> Tokenizer:
    """Byte-pair merges over bytes spelled as characters (GPT-2 and all after it)."""
    name = header.text("tokenizer.ggml.pre", "nothing")
    cut = _CUTS.get(name)
    if cut is None:
        _refuse(header, "tokenizer.ggml.pre", name, ", ".join(_CUTS))
    pairs = [merge.split(" ") for merge in _strings(header, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(
        BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[(left, right) for left, right in pairs],
            ignore_merges=cut.whole_words,
        )
    )
    steps: list[pre_tokenizers.PreTokenizer] = []
    if cut.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if cut.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(cut.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if cut.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(header: GgufHeader, tokens: list[str]) -> Tokenizer:
    """Merges in the order of the scores, spaces spelled ▁, unknown characters as bytes (Llama 2, Mistral 7B)."""
    unknown = _token(header, tokens, "unknown")
    tokenizer = Tokenizer(
        BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=_merges_of_scores(header, tokens),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(header.values.get("tokenizer.ggml.add_space_prefix", True))
    spell = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spell]) if prefix else spell
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _merges_of_scores(header: GgufHeader, tokens: list[str]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best-scored token first."""
    scores = header.arrays.get("tokenizer.ggml.scores", ())
    if len(scores) != len(tokens):
        _refuse(header, "tokenizer.ggml.scores", f"{len(scores)} scores for {len(tokens)} tokens", "one for each token")
    index = {token: i for i, token in enumerate(tokens)}
    merges: list[tuple[float, int, int, str, str]] = []
    for token, score in zip(tokens, scores, strict=True):
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in index and right in index:
                merges.append((-float(score), index[left], index[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _strings(header: GgufHeader, key: str) -> list[str]:
    values = header.arrays.get(key)
    if values is None:
        _refuse(header, key, "nothing", "a list of texts")
    return [str(value) for value in values]


def _token(header: GgufHeader, tokens: list[str], name: str) -> str | None:
    index = header.values.get(f"tokenizer.ggml.{name}_token_id")
    if not isinstance(index, int):
        return None
    if not 0 <= index < len(tokens):
        _refuse(header, f"tokenizer.ggml.{name}_token_id", str(index), f"an id below {len(tokens)}")
    return tokens[index]


def _refuse(header: GgufHeader, key: str, got: str, known: str) -> NoReturn:
    raise BaseModelError(
        "base-tokenizer",
        f"{header.path}: {key} is nothing that Tenon can make a tokenizer of",
        got=got,
        hint=f"use a GGUF file converted by a current llama.cpp (known: {known}), or the base's original folder",
    )
