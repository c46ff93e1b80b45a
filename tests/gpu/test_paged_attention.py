"""Attention over pages that lie anywhere: one token a row, several, both at once; windows; rows that only fill up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from tenon.kernels.paged_attention import Pages, attend, attend_reference, list_queries, write
from tests.gpu.kit import DTYPES, Draw, Judge, each

pytestmark = pytest.mark.usefixtures("poisoned")
PAGE = 16


@dataclass(frozen=True)
class Case:
    """rows: (tokens seen before, new tokens) of each; (-1, 1): a row that fills up."""

    rows: Sequence[tuple[int, int]]
    heads: int
    kv: int
    size: int
    window: int = 0


ONES = [(0, 1), (15, 1), (16, 1), (-1, 1), (300, 1)]
MIXED = [(31, 1), (0, 65), (5, 3), (130, 70), (77, 1), (16, 2)]
CASES = {
    "one row": Case([(200, 1)], 32, 8, 128),
    "one token each": Case(ONES, 32, 8, 128),
    "many rows": Case([(n % 90, 1) for n in range(70)], 9, 3, 64),
    "prompts": Case([(0, 130), (64, 64)], 9, 3, 64),
    "both": Case(MIXED, 14, 2, 64),
    "window": Case(MIXED, 4, 4, 64, window=33),
    "window of one": Case(ONES, 4, 2, 64, window=1),
    "no power of two": Case(MIXED, 6, 2, 80),
}
FEW = ("both", "no power of two")


def pages_of(rows: Sequence[tuple[int, int]], device: torch.device) -> tuple[Pages, int]:
    """Pages in any order, and how many there are."""
    generator = np.random.default_rng(5)
    needed = [-(-(max(past, 0) + new) // PAGE) for past, new in rows]
    order = generator.permutation(sum(needed) + 3)
    table = np.full((len(rows), max(needed) + 2), 2**30, dtype=np.int32)
    at = 0
    for row, count in zip(table, needed, strict=True):
        row[:count] = order[at : at + count]
        at += count
    row_T = np.concatenate([np.full(new, i) for i, (_, new) in enumerate(rows)]).astype(np.int32)
    position_T = np.concatenate([np.arange(past, past + new) for past, new in rows]).astype(np.int32)
    ones, blocks = list_queries([new for _, new in rows])
    there = [torch.from_numpy(x).to(device) for x in (table, row_T, position_T, ones, blocks)]
    return Pages(*there), len(order)


@pytest.mark.parametrize(("name", "dtype"), each(CASES, FEW))
def test_new_tokens_see_their_rows_past_and_themselves(
    name: str, dtype: torch.dtype, device: torch.device, judge: Judge
) -> None:
    case = CASES[name]
    draw = Draw(1, dtype, device)
    pages, count = pages_of(case.rows, device)
    tokens = len(pages.row_T)
    qkv = draw(tokens, case.heads + 2 * case.kv, case.size)
    q, k, v = qkv.split([case.heads, case.kv, case.kv], dim=1)
    keys, values = draw(count, PAGE, case.kv, case.size), draw(count, PAGE, case.kv, case.size)
    expected = [_written(cache.clone(), new, pages) for cache, new in ((keys, k), (values, v))]

    write(k, v, keys, values, pages)
    assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])

    scale = case.size**-0.5
    found = attend(q, keys, values, pages, scale=scale, window=case.window)
    exact = attend_reference(q.double(), keys.double(), values.double(), pages, scale=scale, window=case.window)
    judge("paged attention", found, exact, roundings=4)


def _written(cache: Tensor, new_TKE: Tensor, pages: Pages) -> Tensor:
    for t, (row, position) in enumerate(zip(pages.row_T.tolist(), pages.position_T.tolist(), strict=True)):
        if position >= 0:
            cache[int(pages.table_RM[row, position // PAGE]), position % PAGE] = new_TKE[t]
    return cache


def test_what_nobody_wrote_is_not_read(device: torch.device) -> None:
    """NaN in pages that a row does not reach, and behind its last token, stays there."""
    pages, count = pages_of([(20, 1), (3, 5)], device)
    draw = Draw(1, DTYPES[0], device)
    keys = torch.full((count, PAGE, 2, 64), float("nan"), dtype=DTYPES[0], device=device)
    values = keys.clone()
    for row, past in ((0, 20), (1, 3)):
        for position in range(past):
            page = int(pages.table_RM[row, position // PAGE])
            keys[page, position % PAGE], values[page, position % PAGE] = draw(2, 64), draw(2, 64)
    q, k, v = draw(6, 8, 64).split([4, 2, 2], dim=1)
    write(k, v, keys, values, pages)
    found = attend(q, keys, values, pages, scale=0.125, window=0)
    assert bool(found.isfinite().all())


def test_splits_fill_a_gpu_with_few_rows() -> None:
    from tenon.kernels.paged_attention_triton import parts_of

    assert (parts_of(1, 8), parts_of(32, 8), parts_of(256, 8)) == (32, 2, 1)
