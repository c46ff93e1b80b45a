"""Pieces that several Triton kernels are made of: whose tokens a program has, and the low-rank terms of a block.

A program works on tokens that belong to one slot; it reads that slot's addresses, ranks and scales from a table, so
slots of any rank share one launch. Sums are fp32. Shape legend as in `low_rank`; R is padded to a power of two of at
least 16, what the matrix units take.
"""

from __future__ import annotations

import itertools

from tenon.kernels.gpu import ceil_div, constant, jit, power_of_two, tl

# Tokens of a tile in Routes; kernels cut it into smaller blocks.
TILE = 64
# Fields of a slot's row in a table, where those of its modules begin, and how many each of these has.
MEMBERS_AT = 6
MEMBER_FIELDS = 5
FIELDS = MEMBERS_AT + 3 * MEMBER_FIELDS
_TILE, _FIELDS, _MEMBERS_AT, _MEMBER_FIELDS = map(constant, (TILE, FIELDS, MEMBERS_AT, MEMBER_FIELDS))

# Ranks of one pass of the matrix units; slots of larger rank take several.
MOST_RANK = 64


def padded_rank(rank: int) -> int:
    """A rank as the matrix units take it, at most MOST_RANK at a time."""
    return min(MOST_RANK, power_of_two(rank, least=16))


def row_block(tokens: int) -> int:
    """Tokens of one program: fewer when there are few, so that all of the GPU has work."""
    return 64 if tokens > 16_384 else 32 if tokens > 4_096 else 16


def four_bounds(bounds: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The bounds of one to three modules as four numbers; those that are missing are empty."""
    padded = (*bounds, *(bounds[-1] for _ in range(4 - len(bounds))))
    return padded[0], padded[1], padded[2], padded[3]


def column_blocks(bounds: tuple[int, ...], columns: int) -> int:
    """How many blocks of columns the modules have, each cut alone."""
    return sum(ceil_div(b - a, columns) for a, b in itertools.pairwise(bounds))


@jit
def tile_rows(tiles_ptr, BLOCK: tl.constexpr):
    """(slot, rows, mask) of this program's block of tokens; each tile is cut into blocks."""
    pid, split = tl.program_id(0), _TILE // BLOCK
    tile = tiles_ptr + 3 * (pid // split)
    slot = tl.load(tile)
    stop = tl.load(tile + 2)
    rows = tl.load(tile + 1) + (pid % split) * BLOCK + tl.arange(0, BLOCK)
    return slot, rows.to(tl.int64), rows < stop


@jit
def block_rows(tiles_ptr, tokens, ROWS: tl.constexpr, ROUTED: tl.constexpr):
    """(slot, rows, mask): of a tile where there are routes, else simply the next tokens."""
    if ROUTED:
        slot, rows, mask = tile_rows(tiles_ptr, ROWS)
    else:
        slot = -1
        rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = rows < tokens
    return slot, rows, mask


@jit
def bits_to_float(bits):
    """The fp32 number whose bits a table field holds."""
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@jit
def keep(keys, salt, columns, threshold):
    """(rows, columns) bool: which features stay; see `dropout.keep_mask`."""
    spread = columns.to(tl.uint32) * 0x9E3779B9
    x = (keys.to(tl.uint32, bitcast=True) ^ salt.to(tl.uint32))[:, None] ^ spread[None, :]
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    x = x ^ (x >> 15)
    return x.to(tl.int32, bitcast=True) >= threshold.to(tl.int32)


@jit
def low_rank_block(
    low_ptr,
    stride,
    rows,
    row_mask,
    matrix_ptr,
    step_r,
    step_c,
    columns,
    column_mask,
    rank,
    RANK: tl.constexpr,
):
    """low (rows, rank) times a matrix whose element (r, c) lies at r step_r + c step_c: (rows, columns) fp32.

    RANK ranks at a time, so that a slot of small rank does not pay for a large one beside it.
    """
    acc = tl.zeros((rows.shape[0], columns.shape[0]), dtype=tl.float32)
    for first in range(0, rank, RANK):
        r = first + tl.arange(0, RANK)
        inside = r < rank
        low = tl.load(
            low_ptr + rows[:, None] * stride + r[None, :], mask=row_mask[:, None] & inside[None, :], other=0.0
        )
        matrix = tl.load(
            matrix_ptr + r[:, None] * step_r + columns[None, :].to(tl.int64) * step_c,
            mask=inside[:, None] & column_mask[None, :],
            other=0.0,
        )
        acc = tl.dot(low, matrix, acc, input_precision="ieee")
    return acc


@jit
def site_at(table_ptr, slot):
    """A slot's row of a table."""
    return table_ptr + slot * _FIELDS


@jit
def member_at(site, member):
    """The fields of one module in a slot's row."""
    return site + _MEMBERS_AT + member * _MEMBER_FIELDS


@jit
def matrix_at(address, like_ptr):
    """A pointer to a matrix whose address a table field holds: it begins at 16 bytes."""
    return tl.multiple_of(address.to(like_ptr.dtype), 16)


@jit
def ranks_at(field):
    """A rank, or the place of a module's ranks: a table field that holds whole steps of 8."""
    return tl.multiple_of(tl.load(field).to(tl.int32), 8)


@jit
def member_block(low_ptr, stride, rows, row_mask, site, member, columns, column_mask, RANK: tl.constexpr):
    """s B low of one module for a block of its own outputs: (rows, columns) fp32. site: the slot's table row."""
    at = member_at(site, member)
    b_ptr = matrix_at(tl.load(at), low_ptr)
    rank, start = ranks_at(at + 2), ranks_at(at + 3)
    term = low_rank_block(low_ptr + start, stride, rows, row_mask, b_ptr, 1, rank, columns, column_mask, rank, RANK)
    return term * bits_to_float(tl.load(at + 4))


@jit
def input_block(
    low_ptr, stride, rows, row_mask, site, columns, width, draw_ptr, RANK: tl.constexpr, DROP: tl.constexpr
):
    """drop'(A^T d_low) for a block of inputs: (rows, columns) fp32. width: all inputs."""
    a_ptr, rank = matrix_at(tl.load(site), low_ptr), ranks_at(site + 2)
    term = low_rank_block(low_ptr, stride, rows, row_mask, a_ptr, width, 1, columns, columns < width, rank, RANK)
    if DROP:
        keys = tl.load(draw_ptr + rows, mask=row_mask, other=0)
        stays = keep(keys, tl.load(site + 5), columns, tl.load(site + 3))
        term = tl.where(stays, term * bits_to_float(tl.load(site + 4)), 0.0)
    return term


@jit
def locate(pid, bound_0, bound_1, bound_2, bound_3, COLUMNS: tl.constexpr):
    """(module, its first output, its outputs, the block's columns within it) of a block of columns.

    Blocks are counted module by module, so that none lies across two.
    """
    blocks_0, blocks_1 = tl.cdiv(bound_1 - bound_0, COLUMNS), tl.cdiv(bound_2 - bound_1, COLUMNS)
    member = tl.where(pid < blocks_0, 0, tl.where(pid < blocks_0 + blocks_1, 1, 2))
    block = pid - tl.where(member == 0, 0, tl.where(member == 1, blocks_0, blocks_0 + blocks_1))
    first = tl.where(member == 0, bound_0, tl.where(member == 1, bound_1, bound_2))
    outputs = tl.where(member == 0, bound_1, tl.where(member == 1, bound_2, bound_3)) - first
    return member, first, outputs, block * COLUMNS + tl.arange(0, COLUMNS)
