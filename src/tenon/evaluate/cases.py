"""Rows as cases to judge: the prompt, the answer that is expected, and what kind of task they are together.

The prompt is the renderer's, the same as in chat and serving. When a row's tokens begin with it (the usual case), what
follows is the expected answer as tokens: likelihood and generation then share one pass.
This module does not know decoders or metrics.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tenon.data.render import Renderer
from tenon.data.rows import Chat, Completion, Row, Text, row_hash
from tenon.data.store import TokenRow
from tenon.errors import DataError
from tenon.evaluate.json_fields import is_json
from tenon.evaluate.text import without_reasoning
from tenon.runs.metric_table import Task


class Rows(Protocol):
    """What is judged: rows by index (a `data.store.RowStore`). A row without ids was dropped by the recipe's policy."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> TokenRow:
        """Row `index` as tokens."""
        ...

    def raw(self, index: int) -> Row:
        """Row `index` as it was read."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One row to judge.

    ids, supervised: the whole row as in training. prompt_ids: what generation starts from; empty for plain text.
    answer_ids: the row's tokens after the prompt up to the last supervised one; empty when the row does not begin with
    the prompt. prompt, expected: for people and metrics.
    """

    row: int
    source: str
    ids: np.ndarray
    supervised: np.ndarray
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    prompt: str
    expected: str
    label: str | None

    @property
    def scored_by_answer(self) -> bool:
        """Whether every supervised token lies in `answer_ids`."""
        return bool(self.answer_ids) and not bool(self.supervised[: len(self.prompt_ids)].any())

    @property
    def answer_supervised(self) -> np.ndarray:
        """Which of `answer_ids` are supervised."""
        start = len(self.prompt_ids)
        return self.supervised[start : start + len(self.answer_ids)]


def take_cases(rows: Rows, renderer: Renderer, *, most: int = 0) -> tuple[list[Case], str]:
    """(cases, hash of what their rows hold). most: at most so many rows, spread evenly; 0 for all.

    Raises DataError data-evaluation-empty, and what rendering raises.
    """
    digest, cases = hashlib.sha256(), []
    for index in _chosen(rows, most):
        tokens = rows.row(index)
        if not len(tokens.ids):
            continue
        raw = rows.raw(index)
        digest.update(row_hash(raw))
        cases.append(make_case(index, raw, tokens, renderer))
    if not cases:
        raise DataError(
            "data-evaluation-empty",
            "there is no row to judge",
            got=f"{len(rows)} rows, none of them usable",
            hint="give rows with --data, or hold some out: data.heldout=0.05",
        )
    return cases, digest.hexdigest()


def _chosen(rows: Rows, most: int) -> Iterator[int]:
    """Indices of at most so many rows, spread evenly; 0 for all."""
    count = min(most, len(rows)) if most else len(rows)
    return (number * len(rows) // count for number in range(count))


def make_case(index: int, raw: Row, tokens: TokenRow, renderer: Renderer) -> Case:
    """One row as a case."""
    ids, prompt_ids = tokens.ids, () if isinstance(raw, Text) else tuple(renderer.prompt_of(raw))
    last = int(np.flatnonzero(tokens.supervised)[-1]) + 1
    start = len(prompt_ids)
    begins = 0 < start < last and tuple(ids[:start].tolist()) == prompt_ids
    answer_ids = tuple(ids[start:last].tolist()) if begins else ()
    return Case(
        row=index,
        source=tokens.source,
        ids=ids,
        supervised=tokens.supervised,
        prompt_ids=prompt_ids,
        answer_ids=answer_ids,
        prompt=_prompt_text(raw),
        expected=_expected_text(raw, ids[start if begins else 0 : last], renderer),
        label=raw.label.strip() if isinstance(raw, Chat) and raw.label is not None else None,
    )


def _prompt_text(raw: Row) -> str:
    """What a person would call the question: the last message before the answer, or the prompt of a completion."""
    if isinstance(raw, Completion):
        return raw.prompt
    if isinstance(raw, Text):
        return ""
    before = raw.messages[: _last_answer(raw)]
    return next((m["content"] for m in reversed(before) if isinstance(m.get("content"), str)), "")


def _expected_text(raw: Row, answer_ids: np.ndarray, renderer: Renderer) -> str:
    """The answer that counts as right. A turn that is no plain text (tool calls) is taken as the template writes it."""
    if isinstance(raw, Text):
        return ""
    if isinstance(raw, Completion):
        return raw.completion
    if raw.label is not None:
        return raw.label.strip()
    if _is_plain(raw):
        return without_reasoning(str(raw.messages[_last_answer(raw)]["content"]))
    return without_reasoning(renderer.tokenizer.decode(answer_ids.tolist()))


def _is_plain(raw: Chat) -> bool:
    """Whether the answer is text and nothing else."""
    answer = raw.messages[_last_answer(raw)]
    content = answer.get("content")
    return isinstance(content, str) and bool(content.strip()) and not answer.get("tool_calls")


def _last_answer(raw: Chat) -> int:
    return max(i for i, message in enumerate(raw.messages) if message.get("role") == "assistant")


def find_task(cases: Sequence[Case]) -> Task:
    """labels: every row has one; json: every expected answer is an object or array; likelihood: plain text alone."""
    asked = [case for case in cases if case.prompt_ids]
    if not asked:
        return "likelihood"
    if all(case.label is not None for case in asked):
        return "labels"
    return "json" if all(is_json(case.expected) for case in asked) else "text"


def find_task_early(rows: Rows, renderer: Renderer, *, most: int = 0) -> Task:
    """What `find_task` will say of the cases of `take_cases`, from rows as they were read: nothing is tokenised for it.

    One row that is neither labelled nor JSON decides for all, so most data are not read to their end.
    """
    kinds: set[Task] = set()
    for index in _chosen(rows, most):
        kind = _row_task(rows, index, renderer)
        # A row that the recipe's policy drops has no say; asking for its tokens is worth it only where it would tell.
        if kind not in kinds and len(rows.row(index).ids):
            kinds.add(kind)
        if "text" in kinds:
            return "text"
    asked = kinds - {"likelihood"}
    return "likelihood" if not asked else asked.pop() if len(asked) == 1 else "text"


def _row_task(rows: Rows, index: int, renderer: Renderer) -> Task:
    raw = rows.raw(index)
    if isinstance(raw, Text) or (isinstance(raw, Completion) and not raw.prompt and not renderer.prompt_of(raw)):
        return "likelihood"
    if isinstance(raw, Chat) and raw.label is not None:
        return "labels"
    if isinstance(raw, Chat) and not _is_plain(raw):
        tokens = rows.row(index)
        return "json" if len(tokens.ids) and is_json(make_case(index, raw, tokens, renderer).expected) else "text"
    return "json" if is_json(_expected_text(raw, np.empty(0, dtype=np.int32), renderer)) else "text"


def answer_limit(cases: Sequence[Case], most: int) -> int:
    """Tokens after which an answer is cut: `most`, or a quarter (at least 8) more than the longest expected answer.

    A longer answer is wrong already by exact match, as a label and in its length, and would cost as much time as all
    others together.
    """
    if not all(case.answer_ids for case in cases if case.prompt_ids):
        return most
    longest = max((len(case.answer_ids) for case in cases), default=0)
    return min(most, longest + max(8, longest // 4))
