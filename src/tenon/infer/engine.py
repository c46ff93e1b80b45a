"""Continuous batching: rows of any slots share each pass; who finishes leaves at once and who waits comes in.

A pass takes one token from every row that decodes, and as many prompt tokens of new rows as the budget allows. A row
comes in when the cache has blocks for all that it feeds; when blocks run out later, the youngest row gives its own
back, waits, and is computed again from its prompt and what it has answered. The pass itself is ordered by slot, which
makes a slot's tokens one segment.

Shape legend: T tokens of a pass, D hidden.
This module knows no text, and no more of a request than `Request` says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tenon.batch import IGNORE, AttentionLayout, Batch, Segment
from tenon.data.pack import list_routes, slot_routes, upload
from tenon.infer.guides import Guides
from tenon.infer.logits import Scored, not_finite, score_positions
from tenon.infer.pass_graphs import PassGraphs
from tenon.infer.pooling import Pools
from tenon.infer.requests import Completion, OnFailure, OnFinish, OnToken, Request, Token
from tenon.infer.rows import EngineStats, Row, Taken
from tenon.infer.sampling import Draw
from tenon.models.blocks import BlockKey, block_keys
from tenon.models.cache import KvCache
from tenon.models.decoder import Bank, Decoder


class Engine:
    """Runs requests over one decoder and bank until all have finished."""

    def __init__(
        self,
        decoder: Decoder,
        bank: Bank | None,
        *,
        cache: KvCache,
        pass_tokens: int,
        on_start: Callable[[int], None] | None = None,
        on_token: OnToken | None = None,
        on_finish: OnFinish | None = None,
        on_failure: OnFailure | None = None,
        keep_prefixes: bool = False,
        graphs: PassGraphs | None = None,
        guides: Guides[Any] | None = None,
    ) -> None:
        """pass_tokens: most tokens of one pass; what decodes always goes. on_start: told of each request that has got a
        place, and again when it had given it back. on_failure: told of scores that are not finite, and of grammars that
        cost too much; without it `step` raises. keep_prefixes: remember full blocks for prompts that begin alike (see
        `Request.adapter_key`). graphs: what replays passes, over the same three. guides: for
        requests with a grammar.
        """
        self._decoder, self._bank, self._cache = decoder, bank, cache
        self._pass_tokens, self._on_token, self._on_finish = pass_tokens, on_token, on_finish
        self._on_start, self._on_failure = on_start, on_failure
        self._keep_prefixes, self._graphs, self._guides = keep_prefixes, graphs, guides
        self._waiting: deque[Row] = deque()
        self._rows: list[Row] = []  # in the order of arrival
        self._prefix_hit_tokens, self._preemptions = 0, 0
        self._pools = Pools()
        self._prefixes: dict[int, tuple[list[int], tuple[Tensor, Tensor]]] = {}
        self.completions: dict[int, Completion] = {}

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._waiting or self._rows)

    @property
    def running(self) -> int:
        """Requests that have a place."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._waiting)

    def stats(self) -> EngineStats:
        """How full it is now, and what it has saved and lost so far."""
        pool = self._cache.pool
        return EngineStats(
            running=self.running,
            waiting=self.waiting,
            blocks_total=pool.total,
            blocks_used=pool.used,
            blocks_cached=pool.cached,
            prefix_hit_tokens=self._prefix_hit_tokens,
            preemptions=self._preemptions,
        )

    def submit(self, index: int, request: Request) -> None:
        """Let a request wait for a place; `completions[index]` is its answer when it has finished.

        Raises UsageError usage-grammar; with a grammar that `Guides` has compiled before, that is over at once.
        """
        limit = self._limit(request)
        if len(request.prompt_ids) + len(request.answered) >= limit:
            ids, logprobs = zip(*request.answered, strict=True) if request.answered else ((), ())
            full = ids and len(ids) >= request.max_new_tokens
            self._finish(index, Completion(ids, logprobs, "length" if full else "context"))
            return
        # The last token of an answer is never fed: nothing follows it.
        sequence = [*request.prompt_ids, *request.draft_ids][: limit - 1]
        guide = None
        if request.grammar is not None:
            assert self._guides is not None, "who takes requests with a grammar gives the engine guides"
            guide = self._guides.start(request.grammar, request.stop_ids)
        row = Row(index, request, sequence, limit, guide=guide)
        if request.answered:
            row.resume()
        self._waiting.append(row)

    @torch.inference_mode()
    def cancel(self, index: int) -> None:
        """End a request, with what it has; its place is free at once. Nothing happens when it has ended already."""
        for row in [row for row in self._waiting if row.index == index]:
            self._waiting.remove(row)
            self._pools.drop(index)
            self._finish(index, row.completion("cancelled"))
        for row in self._rows:
            if row.index == index:
                row.finish, row.feed = "cancelled", []
        self._release()

    @torch.inference_mode()
    def share_prefixes(self, prefixes: Mapping[int, Sequence[int]]) -> None:
        """Compute once, for each slot, the tokens that its prompts begin with. Only while nothing runs."""
        for slot, ids in prefixes.items():
            for start in range(0, len(ids), self._pass_tokens):
                self._forward([Taken(0, slot, list(ids[start : start + self._pass_tokens]), start)])
            self._prefixes[slot] = (list(ids), self._cache.prefix(0))
            self._cache.clear(0)

    @torch.inference_mode()
    def step(self) -> None:
        """One pass: let waiting rows in, compute, take tokens, let finished rows out."""
        self._admit()
        if not self._rows:
            return
        moving = self._take()
        hidden_TD = self._forward([taken for _, taken in moving])
        self._advance(moving, hidden_TD)
        self._release()

    # ---- coming in and going out --------------------------------------------------------------------------------

    def _limit(self, request: Request) -> int:
        """The longest sequence that this request may become."""
        room = min(self._decoder.facts.context_tokens, self._cache.capacity_tokens)
        if request.pooling is not None:  # all of the prompt is fed, as if one token were to follow
            return min(room, len(request.prompt_ids)) + 1
        return min(room, len(request.prompt_ids) + max(request.max_new_tokens, len(request.draft_ids), 1))

    def _admit(self) -> None:
        while self._waiting and len(self._rows) < len(self._cache.lengths) and self._let_in(self._waiting[0]):
            self._rows.append(self._waiting.popleft())
            if self._on_start is not None:
                self._on_start(self._rows[-1].index)

    def _let_in(self, row: Row) -> bool:
        """Give a row a place and blocks for all that it feeds; False when there are too few."""
        taken = {other.place for other in self._rows}
        place = next(p for p in range(len(self._cache.lengths)) if p not in taken)
        keys = self._keys(row, row.feed[: row.skippable_tokens])
        # Every row that is not yet as long as it may become is left a block for its next token.
        growing = sum(self._cache.lacks(other.place, other.limit_tokens - 1) for other in self._rows)
        held = self._cache.begin(place, len(row.feed), keys, spare_blocks=growing)
        if held is None:
            return False
        self._prefix_hit_tokens += held
        ids, prefix = self._prefixes.get(row.request.slot, ([], None))
        if prefix is not None and not held and len(ids) <= row.skippable_tokens and row.feed[: len(ids)] == ids:
            self._cache.restore(place, prefix)
            held = len(ids)
        row.place, row.fed, row.feed = place, held, row.feed[held:]
        return True

    def _preempt(self, row: Row) -> None:
        """Take a row's blocks away; it waits before all others and is computed again."""
        self._remember(row)
        self._cache.clear(row.place)
        self._rows.remove(row)
        row.rewind()
        self._waiting.appendleft(row)
        self._preemptions += 1

    def _release(self) -> None:
        for row in [row for row in self._rows if row.finish is not None and not row.feed]:
            assert row.finish is not None
            self._pools.drop(row.index)
            if row.error is None:
                self._remember(row)
                self._finish(row.index, row.completion(row.finish))
            elif self._on_failure is None:
                raise row.error
            else:
                self._on_failure(row.index, row.error)
            self._cache.clear(row.place)
            self._rows.remove(row)

    def _remember(self, row: Row) -> None:
        """Let the cache keep the full blocks that a row holds."""
        self._cache.remember(row.place, self._keys(row, row.held))

    def _keys(self, row: Row, ids: Sequence[int]) -> list[BlockKey]:
        return block_keys(row.owner, ids, self._cache.block_tokens) if self._keep_prefixes else []

    def _finish(self, index: int, completion: Completion) -> None:
        self.completions[index] = completion
        if self._on_finish is not None:
            self._on_finish(index, completion)

    # ---- one pass -----------------------------------------------------------------------------------------------

    def _take(self) -> list[tuple[Row, Taken]]:
        """What the pass takes from which row: a token of each row that decodes, prompts in the order of arrival."""
        taken: list[tuple[Row, Taken]] = []
        room = max(self._pass_tokens - sum(len(row.feed) == 1 for row in self._rows), 1)
        for row in list(self._rows):
            count = 1 if len(row.feed) == 1 else min(len(row.feed), room)
            if count == 0 or not self._has_blocks(row, row.fed + count):
                continue
            room -= count if len(row.feed) > 1 else 0
            taken.append((row, Taken(row.place, row.request.slot, row.feed[:count], row.fed)))
        return sorted(taken, key=lambda pair: (pair[1].slot, pair[1].place))

    def _has_blocks(self, row: Row, tokens: int) -> bool:
        """Let a row have blocks for so many tokens, the youngest rows giving theirs back; False when it was one."""
        while row.place >= 0 and not self._cache.grow(row.place, tokens):
            self._preempt(self._rows[-1])
        return row.place >= 0

    def _forward(self, passing: list[Taken]) -> Tensor:
        """Run the tokens through the decoder and into the cache; hidden states (T, D) in the order given."""
        recorded = None if self._graphs is None else self._graphs.run(passing)
        if recorded is not None:
            return recorded
        counts = tuple(len(taken.ids) for taken in passing)
        attention = self._cache.extend(tuple(taken.place for taken in passing), counts)
        batch = _inference_batch(passing, attention.positions_T, self._decoder.tile_tokens)
        hidden_TD = self._decoder.forward(batch, self._bank, attention)
        attention.commit()
        return hidden_TD

    def _advance(self, moving: list[tuple[Row, Taken]], hidden_TD: Tensor) -> None:
        """Score what the pass reached, and let every row take its tokens."""
        spans, wanted, draws, labels, start = [], [], [], [], 0
        for row, taken in moving:
            request, first = row.request, row.first_scored(taken.position)
            if request.pooling is not None:
                stop = start + len(taken.ids)
                self._pools.add(row.index, request.pooling, hidden_TD[min(start + first, stop) : stop])
                first = len(taken.ids)
            for offset in range(first, len(taken.ids)):
                position = taken.position + offset + 1
                wanted.append(start + offset)
                draws.append(row.draw_at(position))
                labels.append(_known_token(request, position))
            spans.append(max(len(taken.ids) - first, 0))
            start += len(taken.ids)
        hidden_SD = hidden_TD
        if wanted != list(range(len(hidden_TD))):
            (wanted_S,) = upload([np.array(wanted, dtype=np.int64)], hidden_TD.device)
            hidden_SD = hidden_TD[wanted_S]
        masks = self._masks(draws)  # while a GPU is still at work on the pass
        scored = score_positions(self._decoder, hidden_SD, draws, labels, masks=masks)
        if self._on_failure is None and False in scored.finite:
            raise not_finite(draws[scored.finite.index(False)].request.slot)
        at = 0
        for (row, taken), count in zip(moving, spans, strict=True):
            row.feed, row.fed = row.feed[len(taken.ids) :], row.fed + len(taken.ids)
            if row.request.pooling is None:
                self._take_tokens(row, scored, range(at, at + count))
            elif not row.feed:
                self._take_vector(row)
            at += count

    def _masks(self, draws: list[Draw]) -> dict[int, np.ndarray]:
        """What grammars allow at the positions that have one, all in one call."""
        guided = {s: draw.guide for s, draw in enumerate(draws) if draw.guide is not None}
        if not guided or self._guides is None:
            return {}
        return dict(zip(guided, self._guides.masks(list(guided.values())), strict=True))

    def _take_tokens(self, row: Row, scored: Scored, positions: range) -> None:
        """Let a row take what its scored positions say: log probabilities of the draft, tokens of the answer."""
        draft = row.request.draft_ids
        if not all(scored.finite[s] for s in positions):
            row.fail(not_finite(row.request.slot))
            return
        if row.guide is not None and row.guide.error is not None:
            row.fail(row.guide.error)
            return
        for s in positions:
            if row.reads_prompt:
                token_id = row.request.prompt_ids[len(row.prompt) + 1]
                row.prompt.append(Token(token_id, scored.known_logprobs[s], scored.tops[s]))
                continue
            if row.drafting and len(row.draft_logprobs) < len(draft):
                row.draft_logprobs.append(scored.known_logprobs[s])
            if not row.open:
                continue
            agrees = len(row.ids) < len(draft) and draft[len(row.ids)] == scored.ids[s]
            self._push(row, Token(scored.ids[s], scored.logprobs[s], scored.tops[s]))
            row.open = agrees and row.finish is None
        if row.finish is None and not row.feed:
            self._cache.clear(row.place, keep_tokens=row.answer_tokens)
            row.feed, row.fed, row.open = row.ids[-1:], row.answer_tokens, True
            if row.drafting:
                self._remember(row)
            row.drafting = False

    def _take_vector(self, row: Row) -> None:
        """Let a row have its vector: all of its prompt has been read."""
        vector = self._pools.take(row.index)
        if vector is not None:
            row.embedding, row.finish = vector, "stop"
            return
        row.error, row.finish = not_finite(row.request.slot), "cancelled"
        if self._on_failure is None:
            raise row.error

    def _push(self, row: Row, token: Token) -> None:
        """Add one token to the answer, or end it."""
        if row.request.max_new_tokens == 0:
            row.finish = "length"
            return
        if token.id in row.request.stop_ids:
            row.finish = "stop"
            return
        row.take(token)
        if row.guide is not None and row.guide.error is not None:
            row.fail(row.guide.error)
            return
        if self._on_token is not None and self._on_token(row.index, token) is False:
            row.finish, row.feed = "cancelled", []
        elif row.guide is not None and row.guide.complete:
            row.finish = "stop"
        elif len(row.ids) >= row.request.max_new_tokens:
            row.finish = "length"
        elif len(row.request.prompt_ids) + len(row.ids) >= row.limit_tokens:
            row.finish = "context"


def _inference_batch(passing: list[Taken], positions_T: Tensor, tile_tokens: int) -> Batch:
    """The pass as a Batch without labels; attention is the cache's."""
    ids = [token for taken in passing for token in taken.ids]
    bounds, segments = [0], []
    for taken in passing:
        start, stop = bounds[-1], bounds[-1] + len(taken.ids)
        if segments and segments[-1].slot == taken.slot:
            start = segments.pop().start
        segments.append(Segment(taken.slot, start, stop))
        bounds.append(stop)
    listed = list_routes(tuple(segments), tile_tokens)
    ids_T, *routes = upload([np.array(ids), *listed], positions_T.device)
    return Batch(
        ids_T=ids_T,
        positions_T=positions_T,
        labels_T=torch.full_like(ids_T, IGNORE),
        cu_seqlens=tuple(bounds),
        slots=tuple(taken.slot for taken in passing),
        rows=tuple(taken.place for taken in passing),
        segments=tuple(segments),
        attention=AttentionLayout((), None),
        supervised_L=ids_T.new_zeros(0),
        row_tokens=len(ids),
        positions_end=max(taken.position + len(taken.ids) for taken in passing),
        routes=slot_routes(routes, listed) if tile_tokens else None,
    )


def _known_token(request: Request, position: int) -> int:
    """The token that a prompt, or the draft after it, has at a position; IGNORE beyond both."""
    after = position - len(request.prompt_ids)
    if after < 0:
        return request.prompt_ids[position]
    return request.draft_ids[after] if after < len(request.draft_ids) else IGNORE
