"""The Triton kernels of `paged_attention`. Shape legend as there.

Keys and values are found page by page through the table, so that a sequence may lie anywhere; nothing is gathered.
"""

# In a kernel, what a flag leaves unbound is never compiled.
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tenon.kernels.gpu import ceil_div, jit, power_of_two, tl

if TYPE_CHECKING:
    from tenon.kernels.paged_attention import Pages

# Queries of a program where a row brings several tokens.
QUERY_BLOCK = 64
_KEYS = 64
# Programs that keep a large GPU busy, and the most parts that one row's context is read in.
_PROGRAMS = 512
_MOST_PARTS = 32


@jit
def _lines(table_ptr, row, pages, positions, mask, PAGE: tl.constexpr):
    """Where tokens of a row lie in the line of all pages, int64."""
    page = tl.load(table_ptr + row * pages + positions // PAGE, mask=mask, other=0)
    return page.to(tl.int64) * PAGE + positions % PAGE


@jit
def _write_kernel(
    k_ptr,
    v_ptr,
    k_step,
    v_step,
    keys_ptr,
    values_ptr,
    table_ptr,
    pages,
    row_ptr,
    position_ptr,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr + token)
    if position >= 0:
        line = _lines(table_ptr, tl.load(row_ptr + token), pages, position, True, PAGE)
        c = tl.arange(0, COLUMNS)
        inside = c < WIDTH
        tl.store(keys_ptr + line * WIDTH + c, tl.load(k_ptr + token * k_step + c, mask=inside), mask=inside)
        tl.store(values_ptr + line * WIDTH + c, tl.load(v_ptr + token * v_step + c, mask=inside), mask=inside)


@jit
def _see(
    q,
    lines,
    there,
    seen,
    keys_ptr,
    values_ptr,
    kv,
    e,
    e_inside,
    acc,
    most,
    total,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """One block of contexts: weighted values, the running maximum and sum (base 2).

    there (contexts): which exist; what lies behind a row's end may be NaN. seen (queries, contexts).
    """
    at = lines[:, None] * (KV_HEADS * SIZE) + kv * SIZE + e[None, :]
    mask = there[:, None] & e_inside[None, :]
    k = tl.load(keys_ptr + at, mask=mask, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(most, tl.max(scores, 1))
    # A query that has seen nothing yet keeps a maximum of -inf, which must not become NaN.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(most - base)
    v = tl.load(values_ptr + at, mask=mask, other=0.0)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, higher, total * shrink + tl.sum(weights, 1)


@jit
def _one_kernel(
    q_ptr,
    q_step,
    out_ptr,
    part_ptr,
    keys_ptr,
    values_ptr,
    token_ptr,
    row_ptr,
    position_ptr,
    table_ptr,
    pages,
    scale,
    window,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    FEATURES: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
):
    token = tl.load(token_ptr + tl.program_id(0)).to(tl.int64)
    kv, part = tl.program_id(1), tl.program_id(2)
    position = tl.load(position_ptr + token)
    length = position + 1
    begin = 0
    if window > 0:
        begin = tl.maximum(0, length - window) // KEYS * KEYS
    span = tl.cdiv(tl.cdiv(length - begin, PARTS), KEYS) * KEYS
    start = begin + part * span
    stop = tl.minimum(start + span, length)
    e, g = tl.arange(0, FEATURES), tl.arange(0, GROUP)
    e_inside = e < SIZE
    head = kv * (HEADS // KV_HEADS) + g
    mask = (g < HEADS // KV_HEADS)[:, None] & e_inside[None, :]
    q = tl.load(q_ptr + token * q_step + head[:, None] * SIZE + e[None, :], mask=mask, other=0.0)
    q = (q.to(tl.float32) * scale).to(q.dtype)
    acc = tl.zeros((GROUP, FEATURES), dtype=tl.float32)
    most = tl.full((GROUP,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((GROUP,), dtype=tl.float32)
    row = tl.load(row_ptr + token)
    for first in range(start, stop, KEYS):
        n = first + tl.arange(0, KEYS)
        there = n < stop
        seen = there
        if window > 0:
            seen = there & (n >= length - window)
        lines = _lines(table_ptr, row, pages, n, there, PAGE)
        acc, most, total = _see(
            q, lines, there, seen[None, :], keys_ptr, values_ptr, kv, e, e_inside, acc, most, total, KV_HEADS, SIZE
        )
    if PARTS == 1:
        out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(
            out_ptr + token * (HEADS * SIZE) + head[:, None] * SIZE + e[None, :],
            out.to(out_ptr.dtype.element_ty),
            mask=mask,
        )
    else:
        # (rows, heads, parts, size + 2): the weighted values, then their maximum and sum.
        at = part_ptr + ((tl.program_id(0) * HEADS + head) * PARTS + part).to(tl.int64) * (SIZE + 2)
        tl.store(at[:, None] + e[None, :], acc, mask=mask)
        tl.store(at + SIZE, most, mask=g < HEADS // KV_HEADS)
        tl.store(at + SIZE + 1, total, mask=g < HEADS // KV_HEADS)


@jit
def _join_kernel(
    part_ptr,
    out_ptr,
    token_ptr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    FEATURES: tl.constexpr,
    PARTS: tl.constexpr,
):
    token = tl.load(token_ptr + tl.program_id(0)).to(tl.int64)
    head = tl.program_id(1)
    e, p = tl.arange(0, FEATURES), tl.arange(0, PARTS)
    inside = e < SIZE
    at = part_ptr + ((tl.program_id(0) * HEADS + head) * PARTS + p).to(tl.int64) * (SIZE + 2)
    most, total = tl.load(at + SIZE), tl.load(at + SIZE + 1)
    highest = tl.max(most, 0)
    weight = tl.exp2(most - tl.where(highest == float("-inf"), 0.0, highest))
    acc = tl.load(at[:, None] + e[None, :], mask=inside[None, :], other=0.0)
    whole = tl.sum(total * weight, 0)
    out = tl.sum(acc * weight[:, None], 0) / tl.where(whole == 0.0, 1.0, whole)
    tl.store(out_ptr + token * (HEADS * SIZE) + head * SIZE + e, out.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _several_kernel(
    q_ptr,
    q_step,
    out_ptr,
    keys_ptr,
    values_ptr,
    block_ptr,
    row_ptr,
    position_ptr,
    table_ptr,
    pages,
    scale,
    window,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    FEATURES: tl.constexpr,
    PAGE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    head = tl.program_id(1)
    kv = head // (HEADS // KV_HEADS)
    first_token = tl.load(block_ptr + 2 * tl.program_id(0)).to(tl.int64)
    count = tl.load(block_ptr + 2 * tl.program_id(0) + 1)
    row, base = tl.load(row_ptr + first_token), tl.load(position_ptr + first_token)
    i, e = tl.arange(0, QUERIES), tl.arange(0, FEATURES)
    e_inside = e < SIZE
    mask = (i < count)[:, None] & e_inside[None, :]
    tokens = first_token + i
    q = tl.load(q_ptr + tokens[:, None] * q_step + head * SIZE + e[None, :], mask=mask, other=0.0)
    q = (q.to(tl.float32) * scale).to(q.dtype)
    acc = tl.zeros((QUERIES, FEATURES), dtype=tl.float32)
    most = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    begin = 0
    if window > 0:
        begin = tl.maximum(0, base + 1 - window) // KEYS * KEYS
    stop = base + count
    for first in range(begin, stop, KEYS):
        n = first + tl.arange(0, KEYS)
        seen = n[None, :] <= (base + i)[:, None]
        if window > 0:
            seen = seen & (n[None, :] > (base + i)[:, None] - window)
        lines = _lines(table_ptr, row, pages, n, n < stop, PAGE)
        acc, most, total = _see(
            q, lines, n < stop, seen, keys_ptr, values_ptr, kv, e, e_inside, acc, most, total, KV_HEADS, SIZE
        )
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        out_ptr + tokens[:, None] * (HEADS * SIZE) + head * SIZE + e[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=mask,
    )


def write(k_TKE: Tensor, v_TKE: Tensor, keys_NBKE: Tensor, values_NBKE: Tensor, pages: Pages) -> None:
    """See `paged_attention.write`."""
    tokens, heads, size = k_TKE.shape
    _write_kernel[(tokens,)](
        k_TKE,
        v_TKE,
        k_TKE.stride(0),
        v_TKE.stride(0),
        keys_NBKE,
        values_NBKE,
        pages.table_RM,
        pages.table_RM.shape[1],
        pages.row_T,
        pages.position_T,
        PAGE=keys_NBKE.shape[1],
        WIDTH=heads * size,
        COLUMNS=power_of_two(heads * size),
        num_warps=4,
    )


def parts_of(rows: int, kv_heads: int) -> int:
    """In how many parts a row's context is read, so that few rows keep the GPU busy too; a power of two."""
    return max(1, min(_MOST_PARTS, power_of_two(ceil_div(_PROGRAMS, max(rows * kv_heads, 1)))))


def attend(
    q_THE: Tensor, keys_NBKE: Tensor, values_NBKE: Tensor, pages: Pages, out_THE: Tensor, *, scale: float, window: int
) -> None:
    """See `paged_attention.attend`."""
    heads, size = q_THE.shape[1:]
    page, kv_heads = keys_NBKE.shape[1:3]
    # exp2 instead of exp: one multiplication less for every score.
    scale = scale * math.log2(math.e)
    shared = (pages.row_T, pages.position_T, pages.table_RM, pages.table_RM.shape[1], scale, window)
    features = power_of_two(size, least=16)
    rows = pages.ones_N.shape[0]
    if rows:
        parts = parts_of(rows, kv_heads)
        shape = (rows, heads, parts, size + 2) if parts > 1 else (0,)
        part = torch.empty(shape, dtype=torch.float32, device=q_THE.device)
        _one_kernel[(rows, kv_heads, parts)](
            q_THE,
            q_THE.stride(0),
            out_THE,
            part,
            keys_NBKE,
            values_NBKE,
            pages.ones_N,
            *shared,
            HEADS=heads,
            KV_HEADS=kv_heads,
            SIZE=size,
            FEATURES=features,
            GROUP=power_of_two(heads // kv_heads, least=16),
            PAGE=page,
            KEYS=_KEYS,
            PARTS=parts,
            num_warps=4,
            num_stages=3,
        )
        if parts > 1:
            _join_kernel[(rows, heads)](
                part, out_THE, pages.ones_N, HEADS=heads, SIZE=size, FEATURES=features, PARTS=parts, num_warps=2
            )
    if pages.blocks_B2.shape[0]:
        _several_kernel[(pages.blocks_B2.shape[0], heads)](
            q_THE,
            q_THE.stride(0),
            out_THE,
            keys_NBKE,
            values_NBKE,
            pages.blocks_B2,
            *shared,
            HEADS=heads,
            KV_HEADS=kv_heads,
            SIZE=size,
            FEATURES=features,
            PAGE=page,
            QUERIES=QUERY_BLOCK,
            KEYS=_KEYS,
            num_warps=4,
            num_stages=3,
        )
