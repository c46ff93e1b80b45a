"""Generation: the same tokens as a loop without a cache, whatever shares the batch, and as transformers with PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from tenon.adapters.bank import AdapterBank
from tenon.adapters.peft_files import load_adapter, read_adapter
from tenon.bases.facts import ATTENTION_MODULES
from tenon.bases.locate import locate_base
from tenon.bases.read import read_facts
from tenon.batch import NO_SLOT
from tenon.data.pack import PackOptions, bare_row, pack_rows
from tenon.errors import AdapterError, BaseModelError
from tenon.infer.generate import generate, place_bytes, shared_prefixes
from tenon.infer.requests import Completion, Request, Token
from tenon.models.decoder import Decoder
from tenon.models.load import load_decoder
from tenon.settings import Settings
from tests.tiny import CPU, random_slot, slot_shape, tiny_decoder, tiny_facts
from tests.tiny_bases import save_base

FAMILIES = [
    "llama",
    "llama-tied",
    "llama-rope-llama3",
    "mistral-window",
    "qwen2-window",
    "qwen3",
    "qwen3-biases-window",
    "smollm3",
]


def _prompts(count: int, vocab: int, *, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 to 30 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 31, (count,), generator=generator).tolist()
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths]


def _plain_loop(decoder: Decoder, bank: AdapterBank | None, request: Request) -> tuple[list[int], list[float]]:
    """Greedy decoding that runs the whole sequence anew for every token."""
    ids, logprobs = list(request.prompt_ids), []
    while len(logprobs) < request.max_new_tokens and len(ids) < decoder.facts.context_tokens:
        (batch,) = pack_rows([bare_row(request.slot, ids)], PackOptions(10_000), CPU)
        with torch.no_grad():
            scores = decoder.logits(decoder.forward(batch, bank))[-1].log_softmax(-1)
        chosen = int(scores.argmax())
        if chosen in request.stop_ids:
            break
        ids.append(chosen)
        logprobs.append(float(scores[chosen]))
    return ids[len(request.prompt_ids) :], logprobs


def _assert_equals_loop(
    decoder: Decoder, bank: AdapterBank | None, requests: list[Request], found: list[Completion]
) -> None:
    assert len(found) == len(requests)
    for request, completion in zip(requests, found, strict=True):
        ids, logprobs = _plain_loop(decoder, bank, request)
        assert list(completion.ids) == ids
        assert completion.logprobs == pytest.approx(logprobs, abs=1e-4)


@pytest.fixture
def house() -> tuple[Decoder, AdapterBank, list[int]]:
    """A tiny decoder with three slots of different rank and targets."""
    decoder = tiny_decoder()
    bank = AdapterBank(decoder.facts, dtype=torch.float32, device=CPU)
    slots = [
        random_slot(bank, slot_shape(decoder.facts, rank=2), 1, trained=False),
        random_slot(bank, slot_shape(decoder.facts, rank=7, modules=ATTENTION_MODULES), 2, trained=False),
        random_slot(bank, slot_shape(decoder.facts, rank=4, modules=("down_proj",)), 3, trained=True),
    ]
    return decoder, bank, slots


def _mixed(slots: list[int], count: int, **changes: float) -> list[Request]:
    return [
        Request(
            prompt,
            slot=[NO_SLOT, *slots][i % (len(slots) + 1)],
            max_new_tokens=4 + i % 9,
            stop_ids=frozenset({5, 6, 7}),
            temperature=changes.get("temperature", 0.0),
            top_p=changes.get("top_p", 1.0),
            seed=i,
        )
        for i, prompt in enumerate(_prompts(count, 97))
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_a_loop_without_a_cache(family: str, tmp_path: Path, settings: Settings) -> None:
    save_base(family, tmp_path)
    location = locate_base(str(tmp_path), settings)
    decoder = load_decoder(tmp_path, read_facts(location), dtype=torch.float32, device=CPU)
    requests = [Request(p, max_new_tokens=12, stop_ids=frozenset({2})) for p in _prompts(5, 288)]
    _assert_equals_loop(decoder, None, requests, generate(decoder, None, requests, max_rows=3, pass_tokens=16))


def test_p33_mixed_slots_equal_each_alone(house: tuple[Decoder, AdapterBank, list[int]]) -> None:
    decoder, bank, slots = house
    requests = _mixed(slots, 14)
    together = generate(decoder, bank, requests, max_rows=5)
    _assert_equals_loop(decoder, bank, requests, together)
    assert len({c.finish for c in together}) == 2
    alone = [generate(decoder, bank, [request])[0].ids for request in requests]
    assert [c.ids for c in together] == alone
    base = generate(decoder, None, [Request(r.prompt_ids, max_new_tokens=8) for r in requests])
    adapted = generate(decoder, bank, [Request(r.prompt_ids, slot=slots[0], max_new_tokens=8) for r in requests])
    assert [c.ids for c in base] != [c.ids for c in adapted]


def test_p33_draws_do_not_depend_on_the_company(house: tuple[Decoder, AdapterBank, list[int]]) -> None:
    decoder, bank, slots = house
    requests = _mixed(slots, 10, temperature=1.0, top_p=0.9)
    together = [c.ids for c in generate(decoder, bank, requests, max_rows=4, pass_tokens=8)]
    assert together == [generate(decoder, bank, [request])[0].ids for request in requests]
    assert together == [c.ids for c in generate(decoder, bank, requests, max_rows=64)]
    again = [Request(r.prompt_ids, slot=r.slot, temperature=1.0, max_new_tokens=8, seed=99) for r in requests]
    assert [c.ids for c in generate(decoder, bank, again)] != together


@pytest.mark.parametrize("pass_tokens", [1, 7, 1024])
def test_the_pass_size_changes_nothing(house: tuple[Decoder, AdapterBank, list[int]], pass_tokens: int) -> None:
    decoder, bank, slots = house
    requests = _mixed(slots, 9)
    _assert_equals_loop(decoder, bank, requests, generate(decoder, bank, requests, pass_tokens=pass_tokens))


@pytest.mark.parametrize("share", [True, False])
def test_a_shared_beginning_changes_nothing(house: tuple[Decoder, AdapterBank, list[int]], share: bool) -> None:
    decoder, bank, slots = house
    beginnings = {slot: _prompts(1, 97, seed=slot + 5)[0] * 5 for slot in (NO_SLOT, slots[1])}
    requests = [
        Request(beginnings[slot][:50] + tail, slot=slot, max_new_tokens=6)
        for tail in _prompts(5, 97, seed=1)
        for slot in (NO_SLOT, slots[1])
    ]
    found = shared_prefixes(requests, 256)
    assert {slot: len(ids) >= 20 for slot, ids in found.items()} == {NO_SLOT: True, slots[1]: True}
    _assert_equals_loop(decoder, bank, requests, generate(decoder, bank, requests, max_rows=3, share_prefix=share))


def test_shared_beginnings_leave_every_prompt_its_last_token() -> None:
    ids = list(range(80))
    requests = [Request(ids), Request([*ids, 5]), Request([*ids, 6]), Request([9, 9], slot=3), Request([9, 8], slot=3)]
    assert shared_prefixes(requests, 256) == {NO_SLOT: ids[:79]}
    assert shared_prefixes(requests, 70) == {NO_SLOT: ids[:70]}
    assert shared_prefixes(requests[:1], 256) == {}


def _requests_with_drafts(house: tuple[Decoder, AdapterBank, list[int]]) -> tuple[list[Request], list[Request]]:
    """Requests with drafts of every kind: right, wrong from the middle, wrong from the start, too long; and without."""
    decoder, bank, slots = house
    plain = [
        Request(p, slot=[NO_SLOT, *slots][i % 4], max_new_tokens=8, stop_ids=frozenset({3, 4, 5, 6, 7, 8}))
        for i, p in enumerate(_prompts(12, 97, seed=8))
    ]
    answers = generate(decoder, bank, plain)
    drafts = []
    for i, answer in enumerate(answers):
        right = [*answer.ids, 3]
        drafts.append([right, [*right[: len(right) // 2], 96, 95, 94], [94, *right], right + [11] * 9][i % 4])
    with_drafts = [
        Request(r.prompt_ids, slot=r.slot, max_new_tokens=8, stop_ids=r.stop_ids, draft_ids=d)
        for r, d in zip(plain, drafts, strict=True)
    ]
    return plain, with_drafts


@pytest.mark.parametrize("pass_tokens", [6, 1024])
def test_a_draft_changes_nothing_but_is_scored(house: tuple[Decoder, AdapterBank, list[int]], pass_tokens: int) -> None:
    decoder, bank, _ = house
    plain, drafted = _requests_with_drafts(house)
    found = generate(decoder, bank, drafted, max_rows=5, pass_tokens=pass_tokens)
    expected = generate(decoder, bank, plain)
    assert [(c.ids, c.finish) for c in found] == [(c.ids, c.finish) for c in expected]
    assert {c.finish for c in found} == {"stop", "length"}
    for request, completion in zip(drafted, found, strict=True):
        (batch,) = pack_rows(
            [bare_row(request.slot, [*request.prompt_ids, *request.draft_ids])], PackOptions(10_000), CPU
        )
        with torch.no_grad():
            scores = decoder.logits(decoder.forward(batch, bank)).log_softmax(-1)
        first = len(request.prompt_ids) - 1
        draft = [float(scores[first + i, token]) for i, token in enumerate(request.draft_ids)]
        assert completion.draft_logprobs == pytest.approx(draft, abs=1e-4)


def test_tokens_are_told_as_they_come_and_a_request_can_be_cancelled(
    house: tuple[Decoder, AdapterBank, list[int]],
) -> None:
    decoder, bank, slots = house
    told: dict[int, list[int]] = {}

    def on_token(index: int, token: Token) -> bool | None:
        assert token.logprob <= 0.0 and token.top == ()
        told.setdefault(index, []).append(token.id)
        return False if index == 2 and len(told[index]) == 3 else None

    requests = [Request(p, slot=slots[i % 3], max_new_tokens=9) for i, p in enumerate(_prompts(7, 97))]
    found = generate(decoder, bank, requests, max_rows=2, on_token=on_token)
    assert [c.finish for c in found] == ["length"] * 2 + ["cancelled"] + ["length"] * 4
    assert len(found[2].ids) == 3
    assert [list(c.ids) for c in found] == [told[i] for i in range(7)]
    untold = generate(decoder, bank, requests)
    assert [c.ids for i, c in enumerate(untold) if i != 2] == [c.ids for i, c in enumerate(found) if i != 2]


def test_the_context_ends_an_answer_and_a_prompt_without_room_has_none() -> None:
    decoder = tiny_decoder(tiny_facts().model_copy(update={"context_tokens": 20}))
    requests = [
        Request([9] * 15, max_new_tokens=50),
        Request([9] * 19, max_new_tokens=50),
        Request([9] * 20, max_new_tokens=50),
        Request([9] * 400, max_new_tokens=50),
        Request([9] * 15, max_new_tokens=5),
        Request([9] * 15, max_new_tokens=5, draft_ids=[4] * 30),
    ]
    found = generate(decoder, None, requests)
    assert [(len(c.ids), c.finish) for c in found] == [
        (5, "context"),
        (1, "context"),
        (0, "context"),
        (0, "context"),
        (5, "length"),
        (5, "length"),
    ]
    assert len(found[5].draft_logprobs) == 5
    _assert_equals_loop(decoder, None, requests[:2], found[:2])


def test_the_cache_size_decides_the_rows_at_a_time(house: tuple[Decoder, AdapterBank, list[int]]) -> None:
    decoder, bank, slots = house
    requests = _mixed(slots, 6)
    assert place_bytes(decoder.facts, tokens=10, dtype=torch.float32) == 2 * 3 * 10 * 2 * 8 * 4
    most = place_bytes(decoder.facts, tokens=60, dtype=torch.float32)
    for cache_bytes in (1, most, 3 * most):
        _assert_equals_loop(decoder, bank, requests, generate(decoder, bank, requests, cache_bytes=cache_bytes))


def test_no_request_gives_no_answer() -> None:
    assert generate(tiny_decoder(), None, []) == []


def test_p15_scores_that_are_not_finite_are_refused(house: tuple[Decoder, AdapterBank, list[int]]) -> None:
    decoder, bank, slots = house
    bank.slots[slots[0]].parameters_P.fill_(float("nan"))
    with pytest.raises(AdapterError, match="adapter-not-finite") as caught:
        generate(decoder, bank, [Request([4, 5], slot=slots[1]), Request([4, 5], slot=slots[0])])
    assert f"slot {slots[0]}" in caught.value.what
    decoder.final_norm_D.fill_(float("inf"))
    with pytest.raises(BaseModelError, match="base-not-finite"):
        generate(decoder, bank, [Request([4, 5])])


def test_training_goes_on_after_generation(house: tuple[Decoder, AdapterBank, list[int]]) -> None:
    """Tables that generation made grow under inference mode; training must be able to use them afterwards."""
    decoder, bank, slots = house
    generate(decoder, bank, [Request([4, 5, 6], slot=slots[2], max_new_tokens=40)])
    (batch,) = pack_rows([bare_row(slots[2], [4, 5, 6])], PackOptions(100), CPU)
    recording = decoder.record(batch, bank)
    recording.backward(torch.ones_like(recording.hidden_TD))
    gradients = bank.slots[slots[2]].gradients_P
    assert gradients is not None
    assert float(gradients.abs().max()) > 0


def _peft_greedy(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    out = model.generate(  # pyright: ignore
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=2,
        pad_token_id=2,
    )
    ids = out[0, len(prompt) :].tolist()  # pyright: ignore
    return ids[: ids.index(2)] if 2 in ids else ids


def test_greedy_equals_transformers_with_peft(tmp_path: Path, settings: Settings) -> None:
    model = save_base("llama", tmp_path / "base")
    torch.manual_seed(0)
    config = LoraConfig(r=5, lora_alpha=9, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    prompts = _prompts(6, 288)
    bare = [_peft_greedy(model, prompt) for prompt in prompts]
    wrapped = get_peft_model(model, config)
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    adapted = [_peft_greedy(wrapped, prompt) for prompt in prompts]  # pyright: ignore
    assert bare != adapted
    facts = read_facts(locate_base(str(tmp_path / "base"), settings))
    decoder = load_decoder(tmp_path / "base", facts, dtype=torch.float32, device=CPU)
    bank = AdapterBank(facts, dtype=torch.float32, device=CPU)
    slot = load_adapter(bank, "peft", read_adapter(tmp_path / "adapter"))
    requests = [
        Request(p, slot=s, max_new_tokens=10, stop_ids=frozenset({2})) for s in (NO_SLOT, slot) for p in prompts
    ]
    assert [list(c.ids) for c in generate(decoder, bank, requests)] == bare + adapted
