"""Which rows train and which validate: decided on the hashes of what rows hold, so that no row is ever on both sides.

This module does not know files or tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tenon.data.order import permutation

_SPLIT = 2


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Indices into the rows given, int64, ascending.

    train, validation: the two sides; rows with the same content are on the same side. repeated: rows that hold what an
    earlier row of the same side holds. shared: rows taken from train because a validation source holds them.
    """

    train: np.ndarray
    validation: np.ndarray
    repeated: np.ndarray
    shared: np.ndarray


def split_rows(
    hashes: np.ndarray,
    label_ids: np.ndarray,
    *,
    validation: np.ndarray,
    share: float,
    by: str,
    seed: int,
    keep_repeated: bool,
) -> Split:
    """Split rows by content.

    hashes: uint64. label_ids: int32, -1 for rows without a label. validation: bool, rows of validation sources.
    share: of the unique contents of the other rows, held out by `fraction` (an exact number, drawn with the seed) or
    by `content` (each content by itself).
    """
    _, first, content = np.unique(hashes, return_index=True, return_inverse=True)
    count = len(first)
    held = np.zeros(count, dtype=bool)
    held[content[validation]] = True
    shared = held[content] & ~validation
    free = np.flatnonzero(~held)
    if share > 0 and by == "content":
        held[free] = content_side(hashes[first[free]], share, seed)
    elif share > 0:
        held[free[draw_fraction(label_ids[first[free]], share, seed)]] = True
    side = held[content]
    # A row of a train source whose content a validation source holds is in neither: it would be counted twice.
    train, chosen = ~side, side & ~shared
    repeated = _repeated(content, train) | _repeated(content, chosen)
    if not keep_repeated:
        train, chosen = train & ~repeated, chosen & ~repeated
    return Split(*(np.flatnonzero(mask) for mask in (train, chosen, repeated, shared)))


def _repeated(content: np.ndarray, within: np.ndarray) -> np.ndarray:
    """Mask of the rows within `within` that are not the first of their content there."""
    rows = np.flatnonzero(within)
    _, first = np.unique(content[rows], return_index=True)
    mask = within.copy()
    mask[rows[first]] = False
    return mask


def draw_fraction(label_ids: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Positions of exactly round(share * n) of n unique contents, at least one and never all.

    Every label keeps one content in train (as far as the share leaves room): a label met only in validation could not
    be learnt.
    """
    count = len(label_ids)
    wanted = min(max(1, round(share * count)), count - 1)
    if wanted <= 0:
        return np.zeros(0, dtype=np.int64)
    drawn = permutation(count, seed, _SPLIT)
    labels = label_ids[drawn]
    # The content of each label that is drawn last stays in train; so do labels that have only one.
    _, last = np.unique(labels[::-1], return_index=True)
    last = count - 1 - last
    kept = np.zeros(count, dtype=bool)
    kept[last[labels[last] >= 0]] = True
    return np.concatenate([drawn[~kept], drawn[kept]])[:wanted]


def content_side(hashes: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which contents are held out, bool: each decided by its own hash and the seed alone, whatever else there is."""
    with np.errstate(over="ignore"):
        mixed = _mix(hashes.astype(np.uint64) ^ _mix(np.array([seed], dtype=np.int64).view(np.uint64)))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53 < share


def _mix(words: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
