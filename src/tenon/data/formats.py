"""Recognises how a file says its rows, from the names of its fields, and says why.

This module does not convert rows (`convert.py`) and does not know files.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tenon.errors import DataError


@dataclass(frozen=True, slots=True)
class Layout:
    """The fields of one format: those that it needs and those that it understands."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def fields(self) -> frozenset[str]:
        """All fields that the format understands."""
        return frozenset(self.required + self.optional)


# In the order of detection: the more telling names first.
LAYOUTS: dict[str, Layout] = {
    "messages": Layout(("messages",), ("tools", "system")),
    "sharegpt": Layout(("conversations",), ("tools", "system")),
    "alpaca": Layout(("instruction", "output"), ("input", "system", "history")),
    "prompt_completion": Layout(("prompt", "completion"), ("tools",)),
    "labelled": Layout(("text", "label")),
    "text": Layout(("text",)),
}
ALIASES = {"labeled": "labelled", "chat": "messages", "openai": "messages", "completion": "prompt_completion"}
TEXT_NAMES = ("text", "sentence", "utterance", "query", "content", "review", "question", "input")
LABEL_NAMES = ("label", "category", "intent", "class", "sentiment", "topic", "label_text", "target")
CONVERSATION_NAMES = ("messages", "conversations", "conversation")
PREFERENCE_PAIRS = (("chosen", "rejected"), ("chosen_messages", "rejected_messages"))
SAMPLE_ROWS = 100


@dataclass(frozen=True, slots=True)
class Format:
    """How the rows of a file are read.

    name: key of LAYOUTS. reason: why it was taken, for the report. columns: our field -> the file's column, for the
    fields that the file has. prompt: what a labelled row's user turn says, with {column} places.
    """

    name: str
    reason: str
    columns: Mapping[str, str]
    prompt: str = field(default="{text}")


def detect_format(
    sample: Sequence[Mapping[str, Any]], *, source: str, asked: str = "auto", columns: Mapping[str, str], prompt: str
) -> Format:
    """The format of a file, from its first records, the format that the recipe asks for, and its column mapping.

    Raises DataError: data-format-name, data-format-unknown, data-column-missing, data-column-unknown, data-preference.
    """
    present = _present(sample)
    for ours, theirs in columns.items():
        if theirs not in present:
            raise _column_missing(source, ours, theirs, present)
    name = _checked_name(asked, source)
    if name is None:
        _refuse_preference(sample, columns, source)
        name, reason = _guess(sample, present, columns, source)
    else:
        reason = "the recipe says so"
    found = _columns_of(name, sample, present, columns)
    missing = [each for each in LAYOUTS[name].required if not present[found.get(each, "")]]
    if missing:
        raise _unknown_format(source, present, f"as {name}, the rows lack {', '.join(missing)}")
    _refuse_unknown_fields(name, columns, prompt, source)
    return Format(name, reason, found, prompt)


def _present(sample: Sequence[Mapping[str, Any]]) -> Counter[str]:
    return Counter(key for tree in sample for key, value in tree.items() if value is not None)


def _checked_name(asked: str, source: str) -> str | None:
    name = asked.replace("-", "_").lower()
    name = ALIASES.get(name, name)
    if name == "auto":
        return None
    if name not in LAYOUTS:
        near = difflib.get_close_matches(name, LAYOUTS, n=1)
        raise DataError(
            "data-format-name",
            f"{source}: there is no such format",
            got=asked,
            hint=f"did you mean {near[0]}?" if near else f"use auto or one of {', '.join(LAYOUTS)}",
        )
    return name


def _refuse_preference(sample: Sequence[Mapping[str, Any]], columns: Mapping[str, str], source: str) -> None:
    if columns or not sample:
        return
    tree = sample[0]
    pair = next((pair for pair in PREFERENCE_PAIRS if pair[0] in tree and pair[1] in tree), None)
    flagged = [key for key in ("label", "kto_tag") if isinstance(tree.get(key), bool)]
    answered = any(key in tree for key in (*CONVERSATION_NAMES, "completion", "output"))
    if pair is not None or (flagged and answered):
        raise DataError(
            "data-preference",
            f"{source}: the rows are preferences, which supervised training does not learn from",
            got=" and ".join(pair) if pair else f"answers judged by {flagged[0]}",
            hint="give rows with one answer each, or map the wanted answer with columns",
        )


def _guess(
    sample: Sequence[Mapping[str, Any]], present: Counter[str], columns: Mapping[str, str], source: str
) -> tuple[str, str]:
    """(name, reason): the first format whose needed fields most rows have; mapped columns decide first."""
    for name, layout in LAYOUTS.items():
        if columns and not set(columns) & set(layout.required):
            continue
        found = _columns_of(name, sample, present, columns)
        if not all(each in found and present[found[each]] * 2 > len(sample) for each in layout.required):
            continue
        if name != "labelled" and not set(columns) <= layout.fields:
            continue
        named = ", ".join(found[each] for each in layout.required)
        told = " (mapped by the recipe)" if columns else ""
        return name, f"the rows have {named}{told}"
    raise _unknown_format(source, present, "the names of the fields say no known format")


def _columns_of(
    name: str, sample: Sequence[Mapping[str, Any]], present: Counter[str], columns: Mapping[str, str]
) -> dict[str, str]:
    """Our field -> the file's column, for the fields of format `name` that the file has."""
    found = {ours: ours for ours in LAYOUTS[name].fields if ours in present}
    if name in ("messages", "sharegpt"):
        found |= _conversation_column(name, sample)
    if name == "labelled":
        found |= _labelled_columns(present)
    return found | dict(columns)


def _conversation_column(name: str, sample: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Either dialect may stand under either name; the keys of the first message tell them apart."""
    required = LAYOUTS[name].required[0]
    for tree in sample:
        for column in CONVERSATION_NAMES:
            first = next(iter(tree[column]), None) if isinstance(tree.get(column), list) else None
            if isinstance(first, dict):
                return {required: column} if ("from" in first) == (name == "sharegpt") else {required: ""}
    return {}


def _labelled_columns(present: Counter[str]) -> dict[str, str]:
    texts = [name for name in TEXT_NAMES if name in present]
    labels = [name for name in LABEL_NAMES if name in present]
    found = {"text": texts[0]} if texts else {}
    return found | ({"label": labels[0]} if labels else {})


def _refuse_unknown_fields(name: str, columns: Mapping[str, str], prompt: str, source: str) -> None:
    allowed = LAYOUTS[name].fields
    for ours in columns:
        if ours not in allowed and not (name == "labelled" and f"{{{ours}}}" in prompt):
            near = difflib.get_close_matches(ours, allowed, n=1)
            raise DataError(
                "data-column-unknown",
                f"{source}: the format {name} has no field of that name",
                got=f"columns.{ours}",
                hint=f"did you mean {near[0]}?" if near else f"its fields are {', '.join(sorted(allowed))}",
            )


def _column_missing(source: str, ours: str, theirs: str, present: Counter[str]) -> DataError:
    near = difflib.get_close_matches(theirs, present, n=1)
    return DataError(
        "data-column-missing",
        f"{source}: the file has no column for {ours}",
        got=theirs,
        hint=f"did you mean {near[0]}?" if near else f"its columns are {', '.join(sorted(present)) or 'none'}",
    )


def _unknown_format(source: str, present: Counter[str], why: str) -> DataError:
    return DataError(
        "data-format-unknown",
        f"{source}: {why}",
        got=f"fields {', '.join(sorted(present)) or 'none'}",
        hint="map the columns, as in columns: {prompt: question, completion: answer}",
    )
