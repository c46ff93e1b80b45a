"""Labelled rows: which label an answer names, and who is taken for whom.

An answer names a label when it equals it, spaces at the ends apart. Any other answer is `(none)`: wrong whatever was
expected. This module does not know where labels come from.
"""

from __future__ import annotations

from collections.abc import Sequence

NO_LABEL = "(none)"


def named_label(answer: str, labels: Sequence[str] | frozenset[str]) -> str:
    """The label that an answer names, or `(none)`."""
    stripped = answer.strip()
    return stripped if stripped in labels else NO_LABEL


def label_indices(
    expected: Sequence[str], answers: Sequence[str], labels: Sequence[str]
) -> tuple[list[int], list[int]]:
    """Expected labels and answers as indices into `labels`; an answer that names none is -1."""
    index = {label: i for i, label in enumerate(labels)}
    return [index[label] for label in expected], [index.get(answer.strip(), -1) for answer in answers]


def confusion(
    expected: Sequence[str], answers: Sequence[str], labels: Sequence[str]
) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """(names, counts): counts[i][j] rows of label i were answered with j. `(none)` comes last where it occurs."""
    gold, got = label_indices(expected, answers, labels)
    names = (*labels, NO_LABEL) if -1 in got else tuple(labels)
    counts = [[0] * len(names) for _ in names]
    for i, j in zip(gold, got, strict=True):
        counts[i][j] += 1  # -1 is the last column, (none)
    return names, tuple(tuple(row) for row in counts)
