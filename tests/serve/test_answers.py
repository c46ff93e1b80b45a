"""What the server says, through OpenAI's own client: the tokens of `infer.generate`, whole and in pieces."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

from tenon.data.pack import PackOptions, bare_row, pack_rows
from tenon.data.rows import Completion as CompletionRow
from tests.serve.house import House, Running, wait_until
from tests.tiny import CPU

NAMES = {"tiny": None, "low": "low", "high@1": "high"}
TEXTS = ["the house at the lake", "weather together", "then and there", "home"]
HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "the house"}]


def prompt_ids(house: House, text: str) -> list[int]:
    return house.renderer.prompt_of(CompletionRow(text, "", "test"))


def test_adapters_of_different_rank_and_the_base_in_one_batch_say_what_generate_says(
    house: House, client: OpenAI
) -> None:
    asked = [(name, text) for name in NAMES for text in TEXTS]

    def complete(pair: tuple[str, str]) -> tuple[str, str, str]:
        found = client.completions.create(model=pair[0], prompt=pair[1], max_tokens=24, temperature=0)
        return found.choices[0].text, found.choices[0].finish_reason, found.model

    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(complete, asked))
    expected = house.expected(
        [prompt_ids(house, text) for _, text in asked], [NAMES[name] for name, _ in asked], max_new_tokens=24
    )
    assert [(text, finish) for text, finish, _ in answers] == [(house.decode(c.ids), c.finish) for c in expected]
    assert {model for _, _, model in answers} == {"tiny", "low@1", "high@1"}
    assert len({text for text, _, _ in answers}) > len(TEXTS)


def test_a_chat_is_rendered_with_the_template_of_the_base(house: House, client: OpenAI) -> None:
    found = client.chat.completions.create(model="low", messages=HELLO, max_completion_tokens=12, temperature=0)
    ids = house.renderer.prompt([{"role": "user", "content": "the house"}])
    (expected,) = house.expected([ids], ["low"], max_new_tokens=12)
    assert found.choices[0].message.content == house.decode(expected.ids)
    assert found.choices[0].message.role == "assistant" and found.model == "low@1"
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(ids), len(expected.ids))
    parts: list[ChatCompletionMessageParam] = [
        {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "house"}]}
    ]
    again = client.chat.completions.create(model="low", messages=parts, max_tokens=12, temperature=0)
    assert again.choices[0].message == found.choices[0].message


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("model", NAMES)
def test_a_stream_says_what_the_whole_answer_says(client: OpenAI, model: str, temperature: float) -> None:
    fields = {"model": model, "messages": HELLO, "max_tokens": 30, "temperature": temperature, "seed": 5, "n": 2}
    whole = client.chat.completions.create(**fields, logprobs=True, top_logprobs=2)
    stream = client.chat.completions.create(
        **fields, logprobs=True, top_logprobs=2, stream=True, stream_options={"include_usage": True}
    )
    texts, tokens, finishes, last = ["", ""], [[], []], ["", ""], None
    for chunk in stream:
        last = chunk
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += (choice.logprobs and choice.logprobs.content) or []
            finishes[choice.index] += choice.finish_reason or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert finishes == [choice.finish_reason for choice in whole.choices]
    # What was remembered of the prompt may be rounded in another way.
    told = [choice.logprobs.content for choice in whole.choices]
    assert [[each.token for each in one] for one in tokens] == [[each.token for each in one] for one in told]
    for mine, theirs in zip(tokens, told, strict=True):
        assert [each.logprob for each in mine] == pytest.approx([each.logprob for each in theirs], abs=1e-4)
    assert last is not None and last.usage == whole.usage and last.choices == []


def test_a_stream_without_usage_has_none(client: OpenAI) -> None:
    chunks = list(client.completions.create(model="base", prompt="the", max_tokens=3, temperature=0, stream=True))
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks)


def test_samples_follow_the_seed_and_differ(client: OpenAI) -> None:
    def sample(seed: int | None, n: int) -> list[str]:
        found = client.completions.create(model="high", prompt="the", max_tokens=12, seed=seed, n=n, temperature=1.5)
        assert [choice.index for choice in found.choices] == list(range(n))
        return [choice.text for choice in found.choices]

    first = sample(3, 4)
    assert len(set(first)) == 4
    assert sample(3, 4) == first and sample(4, 3) == first[1:]
    assert sample(None, 2) != sample(None, 2)


def test_penalties_and_biases_are_those_of_the_engine(house: House, client: OpenAI) -> None:
    text, base = "the lake", {"model": "low", "max_tokens": 20, "temperature": 0}
    rules: dict[str, Any] = {"presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.3}
    extra = {"repetition_penalty": rules["repetition_penalty"]}
    found = client.completions.create(
        **base, prompt=text, presence_penalty=1.5, frequency_penalty=0.5, logit_bias={"7": -100}, extra_body=extra
    )
    ids = [prompt_ids(house, text)]
    (expected,) = house.expected(ids, ["low"], max_new_tokens=20, logit_bias=((7, -100.0),), **rules)
    assert found.choices[0].text == house.decode(expected.ids)
    plain = client.completions.create(**base, prompt=text)
    assert plain.choices[0].text != found.choices[0].text
    banned = client.chat.completions.create(**base, messages=HELLO, logit_bias={"9": 100}, logprobs=True)
    assert banned.choices[0].logprobs is not None and banned.choices[0].logprobs.content is not None
    assert {token.token for token in banned.choices[0].logprobs.content} == {house.decode((9,))}
    assert all(token.logprob < 0 for token in banned.choices[0].logprobs.content)


def test_several_prompts_are_answered_in_order(house: House, client: OpenAI) -> None:
    found = client.completions.create(model="low", prompt=TEXTS, max_tokens=8, temperature=0, echo=True)
    expected = house.expected([prompt_ids(house, text) for text in TEXTS], ["low"] * 4, max_new_tokens=8)
    answers = [text + house.decode(c.ids) for text, c in zip(TEXTS, expected, strict=True)]
    assert [choice.text for choice in found.choices] == answers
    by_ids = client.completions.create(
        model="low", prompt=[prompt_ids(house, text) for text in TEXTS], max_tokens=8, temperature=0
    )
    assert [choice.text for choice in by_ids.choices] == [house.decode(c.ids) for c in expected]


def test_a_stop_string_is_found_across_tokens_and_not_told(client: OpenAI) -> None:
    fields = {"model": "low", "prompt": "the lake", "temperature": 0, "max_tokens": 40, "logprobs": 0}
    plain = client.completions.create(**fields).choices[0]
    assert plain.logprobs is not None and plain.logprobs.text_offset is not None
    offsets = [at - plain.logprobs.text_offset[0] for at in plain.logprobs.text_offset]
    # From the middle of one token into the next.
    at = next(i for i, (a, b) in enumerate(pairwise(offsets)) if i > 3 and b - a >= 1 and offsets[i + 2] > b)
    stop = plain.text[offsets[at] : offsets[at + 1] + 1]
    cut = plain.text.index(stop)
    whole = client.completions.create(**fields, stop=["never said", stop])
    found = whole.choices[0]
    assert (found.text, found.finish_reason) == (plain.text[:cut], "stop")
    assert found.logprobs is not None and found.logprobs.tokens is not None and plain.logprobs.tokens is not None
    told = [token for token, offset in zip(plain.logprobs.tokens, offsets, strict=True) if offset < cut]
    assert found.logprobs.tokens == told
    chunks = client.completions.create(**fields, stop=stop, stream=True)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == plain.text[:cut]


def test_logprobs_are_those_of_the_model(house: House, client: OpenAI) -> None:
    found = client.chat.completions.create(
        model="high", messages=HELLO, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    ids = house.renderer.prompt([{"role": "user", "content": "the house"}])
    (expected,) = house.expected([ids], ["high"], max_new_tokens=6)
    assert found.choices[0].logprobs is not None and found.choices[0].logprobs.content is not None
    content = found.choices[0].logprobs.content
    assert [token.logprob for token in content] == pytest.approx(expected.logprobs, abs=1e-4)
    for token in content:
        assert [top.logprob for top in token.top_logprobs] == sorted(
            (t.logprob for t in token.top_logprobs), reverse=True
        )
        assert token.top_logprobs[0].logprob == token.logprob and len(token.top_logprobs) == 3
        assert token.bytes is None or bytes(token.bytes).decode() == token.token


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_prompts_are_scored_as_lm_eval_reads_them(house: House, client: OpenAI, max_tokens: int) -> None:
    """`local-completions` sends context and continuation as ids, and reads the echo with one logprob."""
    ids = [prompt_ids(house, text) for text in TEXTS[:3]]
    found = client.completions.create(
        model="base", prompt=ids, max_tokens=max_tokens, temperature=0, logprobs=1, seed=1234, echo=True
    )
    for prompt, choice in zip(ids, found.choices, strict=True):
        (batch,) = pack_rows([bare_row(-1, prompt)], PackOptions(10_000), CPU)
        with torch.no_grad():
            scores = house.decoder.logits(house.decoder.forward(batch, None)).log_softmax(-1)
        assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        assert choice.logprobs.top_logprobs is not None
        logprobs = choice.logprobs.token_logprobs
        assert len(logprobs) == len(prompt) + max_tokens and logprobs[0] is None
        expected = [float(scores[i, token]) for i, token in enumerate(prompt[1:])]
        assert logprobs[1 : len(prompt)] == pytest.approx(expected, abs=1e-4)
        greedy = [int(scores[i].argmax()) == token for i, token in enumerate(prompt[1:])]
        tops = choice.logprobs.top_logprobs[1 : len(prompt)]
        assert [mine == max(top.values()) for mine, top in zip(logprobs[1:], tops, strict=False)] == greedy
    assert found.usage is not None and found.usage.completion_tokens == 3 * max_tokens


def test_an_adapter_that_is_registered_later_answers_without_a_restart(house: House, client: OpenAI) -> None:
    house.register("late", rank=3, seed=11)
    fields = {"prompt": "the lake", "max_tokens": 10, "temperature": 0}
    first = client.completions.create(model="late", **fields)
    house.register("late", rank=5, seed=12)
    second = client.completions.create(model="late", **fields)
    assert (first.model, second.model) == ("late@1", "late@2") and first.choices != second.choices
    assert client.completions.create(model="late@1", **fields).choices == first.choices
    ids = [prompt_ids(house, "the lake")]
    assert second.choices[0].text == house.decode(house.expected(ids, ["late"], max_new_tokens=10)[0].ids)


def test_more_adapters_than_slots_take_turns(house: House, running: Running, client: OpenAI) -> None:
    names = [house.register(f"turn{i}", rank=1 + i, seed=20 + i).name for i in range(5)]
    before = running.server.engine.loads

    def complete(name: str) -> str:
        found = client.completions.create(model=name, prompt="the lake", max_tokens=15, temperature=0)
        return found.choices[0].text

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(complete, names * 2))
    ids = prompt_ids(house, "the lake")
    expected = house.expected([ids] * 5, list(names), max_new_tokens=15)
    assert answers == [house.decode(c.ids) for c in expected] * 2
    assert running.server.engine.loads - before >= 5 and len(running.server.engine.resident) <= 2
    wait_until(lambda: running.server.gate.open == 0)


def test_what_is_remembered_of_a_prompt_belongs_to_its_adapter(house: House, running: Running, client: OpenAI) -> None:
    """One slot after the other is given to another adapter; the prompt is always the same."""
    ids = prompt_ids(house, "the house at the lake is the house that they saw then and there, when others were home")
    names = [house.register(f"memory{i}", rank=2, seed=40 + i).name for i in range(4)]
    completions = house.expected([ids] * 4, list(names), max_new_tokens=9)
    expected = {name: house.decode(c.ids) for name, c in zip(names, completions, strict=True)}
    before = running.server.engine.load.prefix_hit_tokens
    for name in [*names, *reversed(names), *names]:
        found = client.completions.create(model=name, prompt=ids, max_tokens=9, temperature=0)
        assert found.choices[0].text == expected[name]
    assert running.server.engine.load.prefix_hit_tokens > before
