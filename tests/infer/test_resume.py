"""An answer that began in one engine goes on in another as it would have gone on in the first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tenon.adapters.bank import AdapterBank
from tenon.batch import NO_SLOT
from tenon.infer.engine import Engine
from tenon.infer.generate import generate
from tenon.infer.requests import Completion, Request, Token
from tenon.models.cache import KvCache
from tests.tiny import CPU, random_slot, slot_shape, tiny_decoder

PROMPT = [5, 9, 33, 60, 8, 71, 3]
TOKENS = 24


@pytest.mark.parametrize("said", [1, 2, 17, TOKENS - 1])
@pytest.mark.parametrize(
    "how",
    [{}, {"temperature": 1.0}, {"temperature": 1.3, "top_p": 0.9, "top_k": 40, "top_logprobs": 2},
     {"temperature": 0.8, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.6}],
    ids=["greedy", "drawn", "limited", "penalised"],
)  # fmt: skip
def test_the_rest_of_an_answer_is_the_same_wherever_it_is_made(how: dict[str, Any], said: int) -> None:
    decoder = tiny_decoder()
    bank = AdapterBank(decoder.facts, dtype=torch.float32, device=CPU)
    slots = [NO_SLOT, random_slot(bank, slot_shape(decoder.facts, rank=3), 3, trained=False)]
    requests = [Request(PROMPT, slot=slot, max_new_tokens=TOKENS, seed=11, **how) for slot in slots]
    whole = generate(decoder, bank, requests)
    heard: dict[int, list[Token]] = {0: [], 1: []}
    ended: dict[int, Completion] = {}
    engine = Engine(
        decoder,
        bank,
        cache=KvCache(decoder.facts, places=2, tokens=64, dtype=torch.float32, device=CPU),
        pass_tokens=6,
        on_token=lambda index, token: heard[index].append(token),
        on_finish=lambda index, completion: ended.update({index: completion}),
        keep_prefixes=True,
    )
    for index, request in enumerate(requests):
        answered = tuple(zip(whole[index].ids[:said], whole[index].logprobs[:said], strict=True))
        engine.submit(index, replace(request, answered=answered))
    while engine.busy:
        engine.step()
    for index, expected in enumerate(whole):
        assert len(expected.ids) == TOKENS and ended[index].ids == expected.ids
        assert ended[index].finish == expected.finish == "length"
        assert tuple(token.id for token in heard[index]) == expected.ids[said:], "what is said is not said again"
        assert ended[index].logprobs == pytest.approx(expected.logprobs, abs=1e-5)


def test_an_answer_that_was_whole_already_ends_at_once() -> None:
    decoder = tiny_decoder()
    cache = KvCache(decoder.facts, places=1, tokens=64, dtype=torch.float32, device=CPU)
    engine = Engine(decoder, None, cache=cache, pass_tokens=8)
    engine.submit(0, Request(PROMPT, max_new_tokens=2, answered=((4, -0.5), (6, -0.25))))
    assert not engine.busy and engine.completions[0] == Completion((4, 6), (-0.5, -0.25), "length")
