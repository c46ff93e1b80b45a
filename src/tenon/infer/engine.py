"""Continuous batching: rows of any slots share each pass; who finishes leaves at once and who waits comes in.

A pass takes one token from every row that decodes, and as many prompt tokens of new rows as the budget allows. Rows
occupy the first places of the cache without holes (a leaving row's place is taken over by the last one), so attention
reads the cache in place. The pass itself is ordered by slot, which makes a slot's tokens one segment.

Shape legend: T tokens of a pass, S scored positions, D hidden, V vocabulary.
This module knows no text, and no more of a request than `Request` says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tenon.batch import IGNORE, NO_SLOT, AttentionLayout, Batch, Segment
from tenon.data.pack import list_routes, slot_routes, upload
from tenon.errors import AdapterError, BaseModelError, TenonError
from tenon.infer.requests import Completion, FinishReason, OnFailure, OnFinish, OnToken, Request, Token
from tenon.infer.sampling import Draw, sample
from tenon.models.cache import KvCache
from tenon.models.decoder import Bank, Decoder

# Bytes of fp32 scores that are held at once: large enough for full matrix speed.
_SCORE_BYTES = 128 * 1024 * 1024


@dataclass(slots=True)
class _Row:
    """One request on its way. feed: tokens that the cache does not hold yet, from `fed` on.

    drafting: whether what is fed is still the prompt and its draft.
    open: whether the next scored token may join the answer. It closes where the draft parts from the answer: what
    follows there is scored for the draft alone, and the cache is then cut back to the answer.
    error: why it cannot go on.
    """

    index: int
    request: Request
    place: int
    feed: list[int]
    limit_tokens: int
    fed: int = 0
    drafting: bool = True
    open: bool = True
    finish: FinishReason | None = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    draft_logprobs: list[float] = field(default_factory=list)
    prompt: list[Token] = field(default_factory=list)
    error: TenonError | None = None

    @property
    def reads_prompt(self) -> bool:
        """Whether the next scored position belongs to a token of the prompt."""
        return self.request.prompt_logprobs and len(self.prompt) + 1 < len(self.request.prompt_ids)

    def completion(self, finish: FinishReason) -> Completion:
        return Completion(tuple(self.ids), tuple(self.logprobs), finish, tuple(self.draft_logprobs), tuple(self.prompt))


@dataclass(frozen=True, slots=True)
class _Taken:
    """Tokens that one pass takes from a place: `ids`, which begin at `position` of the sequence."""

    place: int
    slot: int
    ids: list[int]
    position: int


@dataclass(frozen=True, slots=True)
class _Scored:
    """What a pass found at its scored positions: the chosen tokens, their log probabilities, those of the known tokens
    (of the draft, or of the prompt), the likeliest tokens where they are wanted, and whether all that is finite.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    known_logprobs: list[float] = field(default_factory=list)
    tops: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    finite: list[bool] = field(default_factory=list)


class Engine:
    """Runs requests over one decoder and bank until all have finished."""

    def __init__(
        self,
        decoder: Decoder,
        bank: Bank | None,
        *,
        cache: KvCache,
        pass_tokens: int,
        on_token: OnToken | None = None,
        on_finish: OnFinish | None = None,
        on_failure: OnFailure | None = None,
    ) -> None:
        """pass_tokens: most tokens of one pass; what decodes always goes. on_failure: told of scores that are not
        finite; without it `step` raises.
        """
        self._decoder, self._bank, self._cache = decoder, bank, cache
        self._pass_tokens, self._on_token, self._on_finish = pass_tokens, on_token, on_finish
        self._on_failure = on_failure
        self._waiting: deque[tuple[int, Request]] = deque()
        self._rows: list[_Row] = []
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

    def submit(self, index: int, request: Request) -> None:
        """Let a request wait for a place; `completions[index]` is its answer when it has finished."""
        if len(request.prompt_ids) >= self._limit(request):
            self._finish(index, Completion((), (), "context"))
        else:
            self._waiting.append((index, request))

    @torch.inference_mode()
    def cancel(self, index: int) -> None:
        """End a request, with what it has; its place is free at once. Nothing happens when it has ended already."""
        kept = deque(pair for pair in self._waiting if pair[0] != index)
        if len(kept) < len(self._waiting):
            self._waiting = kept
            self._finish(index, Completion((), (), "cancelled"))
        for row in self._rows:
            if row.index == index:
                row.finish, row.feed = "cancelled", []
        self._release()

    @torch.inference_mode()
    def share_prefixes(self, prefixes: Mapping[int, Sequence[int]]) -> None:
        """Compute once, for each slot, the tokens that its prompts begin with. Only while nothing runs."""
        for slot, ids in prefixes.items():
            for start in range(0, len(ids), self._pass_tokens):
                self._forward([_Taken(0, slot, list(ids[start : start + self._pass_tokens]), start)])
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
        return min(room, len(request.prompt_ids) + max(request.max_new_tokens, len(request.draft_ids)))

    def _admit(self) -> None:
        while self._waiting and len(self._rows) < len(self._cache.lengths):
            index, request = self._waiting.popleft()
            limit, place, held = self._limit(request), len(self._rows), self._restore_prefix(request, len(self._rows))
            # The last token is never fed: nothing follows it.
            sequence = [*request.prompt_ids, *request.draft_ids][: limit - 1]
            self._rows.append(_Row(index, request, place, sequence[held:], limit, fed=held))

    def _restore_prefix(self, request: Request, place: int) -> int:
        """Give a place the shared beginning of its prompt; returns how many tokens that saves."""
        self._cache.clear(place)
        ids, prefix = self._prefixes.get(request.slot, ([], None))
        if request.prompt_logprobs:
            return 0  # what is restored is not scored
        if prefix is None or len(request.prompt_ids) <= len(ids) or list(request.prompt_ids[: len(ids)]) != ids:
            return 0
        self._cache.restore(place, prefix)
        return len(ids)

    def _release(self) -> None:
        for row in [row for row in reversed(self._rows) if row.finish is not None and not row.feed]:
            assert row.finish is not None
            if row.error is None:
                self._finish(row.index, row.completion(row.finish))
            elif self._on_failure is not None:
                self._on_failure(row.index, row.error)
            last = self._rows[-1]
            if last is not row:
                self._cache.move(last.place, row.place)
                last.place, self._rows[row.place] = row.place, last
            self._rows.pop()

    def _finish(self, index: int, completion: Completion) -> None:
        self.completions[index] = completion
        if self._on_finish is not None:
            self._on_finish(index, completion)

    # ---- one pass -----------------------------------------------------------------------------------------------

    def _take(self) -> list[tuple[_Row, _Taken]]:
        """What the pass takes from which row: first the rows that decode, then prompts in the order of arrival."""
        taken: list[tuple[_Row, _Taken]] = []
        room = max(self._pass_tokens - sum(len(row.feed) == 1 for row in self._rows), 1)
        for row in self._rows:
            count = 1 if len(row.feed) == 1 else min(len(row.feed), room)
            if count == 0:
                continue
            room -= count if len(row.feed) > 1 else 0
            taken.append((row, _Taken(row.place, row.request.slot, row.feed[:count], row.fed)))
        return sorted(taken, key=lambda pair: (pair[1].slot, pair[1].place))

    def _forward(self, passing: list[_Taken]) -> Tensor:
        """Run the tokens through the decoder and into the cache; hidden states (T, D) in the order given."""
        counts = tuple(len(taken.ids) for taken in passing)
        attention = self._cache.extend(tuple(taken.place for taken in passing), counts)
        batch = _inference_batch(passing, attention.positions_T, self._decoder.tile_tokens)
        hidden_TD = self._decoder.forward(batch, self._bank, attention)
        attention.commit()
        return hidden_TD

    def _advance(self, moving: list[tuple[_Row, _Taken]], hidden_TD: Tensor) -> None:
        """Score what the pass reached, and let every row take its tokens."""
        spans, wanted, draws, labels, start = [], [], [], [], 0
        for row, taken in moving:
            request, prompt_tokens = row.request, len(row.request.prompt_ids)
            first = 0 if request.prompt_logprobs else max(prompt_tokens - 1 - taken.position, 0)
            for offset in range(first, len(taken.ids)):
                position = taken.position + offset + 1
                wanted.append(start + offset)
                draws.append(Draw(request, position, drawn=position >= prompt_tokens))
                labels.append(_known_token(request, position))
            spans.append(max(len(taken.ids) - first, 0))
            start += len(taken.ids)
        scored = self._score(hidden_TD[torch.tensor(wanted, device=hidden_TD.device, dtype=torch.int64)], draws, labels)
        at = 0
        for (row, taken), count in zip(moving, spans, strict=True):
            row.feed, row.fed = row.feed[len(taken.ids) :], row.fed + len(taken.ids)
            self._take_tokens(row, scored, range(at, at + count))
            at += count

    def _score(self, hidden_SD: Tensor, draws: list[Draw], labels: list[int]) -> _Scored:
        rows = max(1, _SCORE_BYTES // (4 * self._decoder.facts.vocab))
        scored = _Scored()
        for start in range(0, len(draws), rows):
            part = slice(start, start + rows)
            logits_SV = self._decoder.logits(hidden_SD[part]).float()
            chosen_S = sample(logits_SV, draws[part])
            both_S2 = torch.stack([chosen_S, torch.tensor(labels[part], device=chosen_S.device).clamp(min=0)], dim=1)
            logprobs_S2 = logits_SV.gather(1, both_S2) - logits_SV.logsumexp(dim=-1, keepdim=True)
            scored.ids.extend(chosen_S.tolist())
            scored.logprobs.extend(logprobs_S2[:, 0].tolist())
            scored.known_logprobs.extend(logprobs_S2[:, 1].tolist())
            scored.tops.extend(_likeliest(logits_SV, draws[part]))
            scored.finite.extend(torch.isfinite(logprobs_S2).all(dim=1).tolist())
        if self._on_failure is None and False in scored.finite:
            raise _not_finite(draws[scored.finite.index(False)].request.slot)
        return scored

    def _take_tokens(self, row: _Row, scored: _Scored, positions: range) -> None:
        """Let a row take what its scored positions say: log probabilities of the draft, tokens of the answer."""
        draft = row.request.draft_ids
        if not all(scored.finite[s] for s in positions):
            row.error, row.finish, row.feed = _not_finite(row.request.slot), "cancelled", []
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
            answer_tokens = len(row.request.prompt_ids) + len(row.ids) - 1
            self._cache.clear(row.place, keep_tokens=answer_tokens)
            row.feed, row.fed, row.open, row.drafting = row.ids[-1:], answer_tokens, True, False

    def _push(self, row: _Row, token: Token) -> None:
        """Add one token to the answer, or end it."""
        if token.id in row.request.stop_ids:
            row.finish = "stop"
            return
        row.ids.append(token.id)
        row.logprobs.append(token.logprob)
        if self._on_token is not None and self._on_token(row.index, token) is False:
            row.finish, row.feed = "cancelled", []
        elif len(row.ids) >= row.request.max_new_tokens:
            row.finish = "length"
        elif len(row.request.prompt_ids) + len(row.ids) >= row.limit_tokens:
            row.finish = "context"


def _inference_batch(passing: list[_Taken], positions_T: Tensor, tile_tokens: int) -> Batch:
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


def _likeliest(logits_SV: Tensor, draws: Sequence[Draw]) -> list[tuple[tuple[int, float], ...]]:
    """For each position the likeliest tokens with their log probabilities, as many as its request wants."""
    found: list[tuple[tuple[int, float], ...]] = [()] * len(draws)
    wanting = [s for s, draw in enumerate(draws) if draw.request.top_logprobs]
    if not wanting:
        return found
    scores_SV = logits_SV[torch.tensor(wanting, device=logits_SV.device)]
    most = min(max(draws[s].request.top_logprobs for s in wanting), scores_SV.shape[1])
    top = scores_SV.topk(most)
    logprobs_SK = (top.values - scores_SV.logsumexp(dim=-1, keepdim=True)).tolist()
    for s, ids, logprobs in zip(wanting, top.indices.tolist(), logprobs_SK, strict=True):
        found[s] = tuple(zip(ids, logprobs, strict=True))[: draws[s].request.top_logprobs]
    return found


def _not_finite(slot: int) -> TenonError:
    """The error for scores that are NaN or infinite."""
    if slot == NO_SLOT:
        return BaseModelError(
            "base-not-finite",
            "the base gives scores that are not finite",
            hint="its files are damaged, or fp16 is too narrow for it; try precision: bf16 or fp32",
        )
    return AdapterError(
        "adapter-not-finite",
        f"the adapter in slot {slot} gives scores that are not finite",
        hint="its weights are damaged or too large; go back to an earlier version: tenon adapters list",
    )
