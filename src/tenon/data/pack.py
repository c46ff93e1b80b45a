"""Rows of any slots, packed into batches without padding.

Packing decides only where tokens lie: loss and gradients are those of the rows run alone. When all rows of a slot in a
batch begin with the same unsupervised tokens (a system prompt), these are computed once and every row attends to them;
the gradient that flows back into them is the sum of what the rows would have sent.

Shape legend: T tokens of the stream, G rows of an attention group, Q queries and C contexts of a row.
This module does not know where rows come from, nor what is computed on them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tenon.batch import IGNORE, NO_SLOT, AttentionGroup, AttentionLayout, Batch, PackedRows, Segment, SlotRoutes
from tenon.kernels.dropout import mix32


@dataclass(frozen=True, slots=True)
class _Costs:
    """What one more attention call costs on a kind of device, in the work that it must save to be worth it.

    group_pairs: padded query-context pairs. prefix_tokens: tokens that a shared prefix must save.
    """

    group_pairs: int
    prefix_tokens: int


# Measured on SmolLM2-135M: a CPU pays for arithmetic, a GPU with short rows pays for launches.
_COSTS = {
    "cpu": _Costs(group_pairs=2_000, prefix_tokens=64),
    "cuda": _Costs(group_pairs=2_000_000, prefix_tokens=4_096),
}


@dataclass(frozen=True, slots=True, eq=False)
class PackRow:
    """One row on its way into a batch: its slot, token ids, which of them are supervised, its index, its dropout
    key.
    """

    slot: int
    ids: np.ndarray
    supervised: np.ndarray
    index: int = -1
    draw: int = 0

    @property
    def labels(self) -> np.ndarray:
        """What should follow each token, or IGNORE; the last token predicts nothing."""
        labels = np.full(len(self.ids), IGNORE, dtype=np.int64)
        labels[:-1] = np.where(self.supervised[1:], self.ids[1:], IGNORE)
        return labels


def bare_row(slot: int, ids: Sequence[int]) -> PackRow:
    """A row without labels, for inference."""
    return PackRow(slot, np.asarray(ids, dtype=np.int64), np.zeros(len(ids), dtype=bool))


@dataclass(frozen=True, slots=True)
class PackOptions:
    """How rows become batches.

    micro_tokens: most tokens of a batch (one longer row still goes alone). dropout: whether any slot needs keys.
    packed: rows without a shared prefix are attended as they lie (variable-length attention; see
    `Decoder.attends_packed`) instead of in groups of like length. tile_tokens: above 0, the tokens are listed in tiles
    of so many for fused kernels (`Decoder.tile_tokens`). bucket: pad a batch with a row of no slot and tokens without
    weight, so that batches share shapes; needs packed and tile_tokens, and is not done where a prefix is shared.
    """

    micro_tokens: int
    share_prefix: bool = True
    dropout: bool = False
    packed: bool = False
    tile_tokens: int = 0
    bucket: bool = False

    @property
    def shares(self) -> bool:
        """Whether prefixes are shared: not with dropout, where every row draws its own mask for the prefix."""
        return self.share_prefix and not self.dropout


def pack_rows(rows: Sequence[PackRow], options: PackOptions, device: torch.device) -> list[Batch]:
    """All rows in as few batches as the token limit allows, of nearly equal size; rows of a slot are neighbours."""
    ordered = sorted(rows, key=lambda row: (row.slot, -len(row.ids)))
    costs = _COSTS[device.type]
    prefixes = {
        run[0].slot: _shared_prefix(run, costs.prefix_tokens) if options.shares else 0 for run in _runs(ordered)
    }
    parts = _split(ordered, prefixes, options.micro_tokens)
    return [_batch(part, prefixes, device, options) for part in parts]


def _split(rows: list[PackRow], prefixes: dict[int, int], micro_tokens: int) -> list[list[PackRow]]:
    """Cut the rows into batches of at most micro_tokens, filled evenly."""
    total = sum(prefixes.values()) + sum(len(row.ids) - prefixes[row.slot] for row in rows)
    batches = -(-total // micro_tokens)
    longest = max((len(row.ids) for row in rows), default=0)
    target = micro_tokens if batches <= 1 else min(micro_tokens, -(-total // batches) + longest // 2)
    parts: list[list[PackRow]] = []
    used = 0
    for row in rows:
        own = len(row.ids) - prefixes[row.slot]
        cost = own if parts and parts[-1][-1].slot == row.slot else len(row.ids)
        if not parts or used + cost > target:
            parts.append([])
            used, cost = 0, len(row.ids)
        parts[-1].append(row)
        used += cost
    return parts


def _runs(rows: list[PackRow]) -> list[list[PackRow]]:
    """Neighbouring rows of the same slot."""
    runs: list[list[PackRow]] = []
    for row in rows:
        if runs and runs[-1][0].slot == row.slot:
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs


def _shared_prefix(rows: list[PackRow], min_saved_tokens: int) -> int:
    """Length of the common beginning without labels, or 0 when sharing it saves too little."""
    if len(rows) < 2:
        return 0
    first = rows[0].ids
    length = min(_free_prefix(row) for row in rows)
    for row in rows[1:]:
        same = np.flatnonzero(first[:length] != row.ids[:length])
        length = int(same[0]) if len(same) else length
    return length if length * (len(rows) - 1) >= min_saved_tokens else 0


def _free_prefix(row: PackRow) -> int:
    """Tokens at the start that have no label, leaving at least one token to the row itself."""
    supervised = np.flatnonzero(row.supervised[1:])
    return int(supervised[0]) if len(supervised) else len(row.ids) - 1


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tokens [skip:] of a row (or [:stop] as a shared prefix) at `start` of the stream."""

    row: PackRow
    start: int
    skip: int
    stop: int
    prefix_start: int

    @property
    def length(self) -> int:
        return self.stop - self.skip

    @property
    def pairs(self) -> int:
        """Query-context pairs of its attention, causal or not."""
        return self.length * self.stop


def _batch(rows: list[PackRow], prefixes: dict[int, int], device: torch.device, options: PackOptions) -> Batch:
    pieces = _lay_pieces(rows, prefixes)
    bucket = options.bucket and all(p.prefix_start < 0 and p.skip == 0 for p in pieces)
    if bucket:
        pieces.append(_padding(pieces))
    ids = np.concatenate([p.row.ids[p.skip : p.stop] for p in pieces])
    labels = np.concatenate([p.row.labels[p.skip : p.stop] for p in pieces])
    positions = np.concatenate([np.arange(p.skip, p.stop) for p in pieces])
    draws = np.repeat(np.array([p.row.draw for p in pieces], dtype=np.int32), [p.length for p in pieces])
    supervised = np.flatnonzero(labels != IGNORE)
    if bucket:
        supervised = _padded_labels(labels, supervised)
    segments = _segments(pieces)
    listed = list_routes(segments, options.tile_tokens, pad=bucket)
    ids_T, labels_T, positions_T, supervised_L, *routes = upload([ids, labels, positions, supervised, *listed], device)
    return Batch(
        ids_T=ids_T,
        positions_T=positions_T,
        labels_T=labels_T,
        cu_seqlens=(*(p.start for p in pieces), len(ids)),
        slots=tuple(p.row.slot for p in pieces),
        rows=tuple(p.row.index for p in pieces),
        segments=segments,
        attention=_attention_layout(pieces, len(ids), device, packed=options.packed, bucket=bucket),
        supervised_L=supervised_L,
        row_tokens=sum(len(row.ids) for row in rows),
        positions_end=max(p.stop for p in pieces),
        draw_T=_token_draws(draws, positions).to(device) if options.dropout else None,
        routes=slot_routes(routes, listed) if options.tile_tokens else None,
    )


# A gradient's sum over tokens is cut into chunks, so that all of a GPU has work and none of it walks far: above
# _WHOLE_TOKENS, into _CHUNKS of at least _CHUNK_TOKENS.
_WHOLE_TOKENS = 768
_CHUNKS = 8
_CHUNK_TOKENS = 256


# Shapes of batches are rounded up to these: tokens, labelled tokens, rows, and the least length of the longest row.
_BUCKET_TOKENS, _BUCKET_LABELS, _BUCKET_ROWS, _BUCKET_LONGEST = 128, 64, 8, 128


def _padding(pieces: list[_Piece]) -> _Piece:
    """A row of no slot that fills the batch up to its bucket; of at least one token, which all padding points at."""
    tokens = sum(piece.length for piece in pieces)
    fill = _round_up(tokens + 1, _BUCKET_TOKENS) - tokens
    return _Piece(bare_row(NO_SLOT, [0] * fill), tokens, 0, fill, -1)


def _padded_labels(labels: np.ndarray, supervised: np.ndarray) -> np.ndarray:
    """The labelled tokens, filled up with the last token of the padding, which gets a label that nobody weighs."""
    labels[-1] = 0
    extra = _round_up(len(supervised), _BUCKET_LABELS) - len(supervised)
    return np.concatenate([supervised, np.full(extra, len(labels) - 1)])


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def list_routes(segments: tuple[Segment, ...], tile_tokens: int, *, pad: bool = False) -> list[np.ndarray]:
    """Flat int64 triples for `SlotRoutes`: tiles, chunks, segments; all empty without tiles.

    pad: as many tiles as any segments of so many tokens could need; those that are too many are empty.
    """
    if not tile_tokens:
        return [np.zeros(0, dtype=np.int64)] * 3
    tokens = segments[-1].stop if segments else 0
    chunk = tokens if tokens <= _WHOLE_TOKENS else max(_CHUNK_TOKENS, _round_up(-(-tokens // _CHUNKS), tile_tokens))
    chunks, runs = _cut(segments, chunk), []
    for s in segments:
        if s.slot >= 0:
            inside = [i for i, (_, start, _) in enumerate(chunks) if s.start <= start < s.stop]
            runs.append((s.slot, inside[0], inside[-1] + 1))
    tiles = _cut(segments, tile_tokens)
    if pad:
        tiles += [(NO_SLOT, 0, 0)] * (tokens // tile_tokens + len(segments) - len(tiles))
        chunks += [(NO_SLOT, 0, 0)] * (tokens // chunk + len(segments) - len(chunks))
    return [np.array(x, dtype=np.int64).reshape(-1) for x in (tiles, chunks, runs)]


def list_tiles(slots_T: np.ndarray, tile_tokens: int) -> np.ndarray:
    """(tiles, 3) int64: (slot, start, stop) of runs of at most so many tokens of one slot."""
    edges = [0, *(np.flatnonzero(np.diff(slots_T)) + 1).tolist(), len(slots_T)]
    segments = tuple(Segment(int(slots_T[a]), a, b) for a, b in itertools.pairwise(edges) if a < b)
    return np.array(_cut(segments, tile_tokens), dtype=np.int64).reshape(-1, 3)


def _cut(segments: tuple[Segment, ...], length: int) -> list[tuple[int, int, int]]:
    """Runs of at most `length` tokens of one slot."""
    return [(s.slot, at, min(at + length, s.stop)) for s in segments for at in range(s.start, s.stop, length)]


def slot_routes(tensors: Sequence[torch.Tensor], listed: Sequence[np.ndarray]) -> SlotRoutes:
    """What `list_routes` listed, with the same on the device."""
    tiles, chunks, runs = (tensor.view(-1, 3) for tensor in tensors)
    host = [array.reshape(-1, 3) for array in listed]
    return SlotRoutes(tiles, chunks, runs, bool((host[2][:, 2] - host[2][:, 1] == 1).all()), (host[0], host[1]))


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """int64 tensors of several arrays, by one copy to the device; each begins at a multiple of 16 bytes."""
    starts = np.cumsum([0, *(len(array) + len(array) % 2 for array in arrays)])
    whole = torch.empty(int(starts[-1]), dtype=torch.int64, pin_memory=device.type == "cuda")
    for array, start in zip(arrays, starts, strict=False):
        whole[start : start + len(array)] = torch.from_numpy(array)
    there = whole.to(device, non_blocking=True)
    return [there[start : start + len(array)] for array, start in zip(arrays, starts, strict=False)]


def _token_draws(draws: np.ndarray, positions: np.ndarray) -> torch.Tensor:
    """The dropout key of each token, from its row's key and its position."""
    return mix32(torch.from_numpy(draws) + torch.from_numpy(positions.astype(np.int32)) * 0x3C6EF372)


def _lay_pieces(rows: list[PackRow], prefixes: dict[int, int]) -> list[_Piece]:
    """The stream in order: per slot its shared prefix, if any, then its rows."""
    pieces: list[_Piece] = []
    at = 0
    for run in _runs(rows):
        prefix = prefixes[run[0].slot] if len(run) > 1 else 0
        prefix_start = at
        if prefix:
            pieces.append(_Piece(run[0], at, 0, prefix, -1))
            at += prefix
        for row in run:
            pieces.append(_Piece(row, at, prefix, len(row.ids), prefix_start if prefix else -1))
            at += len(row.ids) - prefix
    return pieces


def _segments(pieces: list[_Piece]) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    for piece in pieces:
        stop = piece.start + piece.length
        if segments and segments[-1].slot == piece.row.slot:
            segments[-1] = Segment(piece.row.slot, segments[-1].start, stop)
        else:
            segments.append(Segment(piece.row.slot, piece.start, stop))
    return tuple(segments)


def _attention_layout(
    pieces: list[_Piece], tokens: int, device: torch.device, *, packed: bool, bucket: bool = False
) -> AttentionLayout:
    """Groups of rows of like length under the same prefix, and where their outputs belong; or the rows as they lie."""
    if packed and all(p.prefix_start < 0 and p.skip == 0 for p in pieces):
        bounds, longest = [*(p.start for p in pieces), tokens], max(p.length for p in pieces)
        if bucket:
            bounds += [tokens] * (_round_up(len(bounds), _BUCKET_ROWS) - len(bounds))
            longest = max(_BUCKET_LONGEST, 1 << (longest - 1).bit_length())
        cu_N = torch.tensor(bounds, dtype=torch.int32, pin_memory=device.type == "cuda")
        equal = not bucket and len({p.length for p in pieces}) == 1
        rows = PackedRows(cu_N.to(device, non_blocking=True), longest, equal)
        return AttentionLayout((), None, rows)
    groups: list[AttentionGroup] = []
    restore = np.empty(tokens, dtype=np.int64)
    at = 0
    for members in _attention_groups(pieces, _COSTS[device.type].group_pairs):
        width = max(p.length for p in members)
        for i, piece in enumerate(members):
            restore[piece.start : piece.start + piece.length] = at + i * width + np.arange(piece.length)
        groups.append(_attention_group(members, width, device))
        at += len(members) * width
    in_order = at == tokens and np.array_equal(restore, np.arange(tokens))
    return AttentionLayout(tuple(groups), None if in_order else torch.from_numpy(restore).to(device))


def _attention_groups(pieces: list[_Piece], group_pairs: int) -> list[list[_Piece]]:
    """Pieces under the same prefix, longest first; a new group begins where padding would cost more than a call."""
    groups: list[list[_Piece]] = []
    padded_pairs = 0
    for piece in sorted(pieces, key=lambda p: (p.prefix_start, -p.length)):
        if groups and groups[-1][0].prefix_start == piece.prefix_start:
            longest = groups[-1][0]
            padded_pairs += longest.pairs - piece.pairs
            if padded_pairs <= group_pairs:
                groups[-1].append(piece)
                continue
        groups.append([piece])
        padded_pairs = 0
    return groups


def _attention_group(members: list[_Piece], width: int, device: torch.device) -> AttentionGroup:
    first = members[0]
    adjacent = all(b.start == a.start + width for a, b in itertools.pairwise(members))
    if first.prefix_start < 0 and adjacent and all(p.length == width for p in members):
        return AttentionGroup(len(members), first.start, first.start + width * len(members), None, None, 0)
    own = np.stack([p.start + np.minimum(np.arange(width), p.length - 1) for p in members])
    offset = first.skip
    prefix = np.broadcast_to(np.arange(offset) + first.prefix_start, (len(members), offset))
    context = np.concatenate([prefix, own], axis=1) if first.prefix_start >= 0 else own
    query_GQ, context_GC = torch.from_numpy(own).to(device), torch.from_numpy(np.ascontiguousarray(context)).to(device)
    return AttentionGroup(len(members), 0, 0, query_GQ, context_GC, offset)
