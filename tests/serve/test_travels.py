"""What travels with an adapter is what it is asked with: its template, its stop tokens, its generation defaults."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from tenon.plan.values import Generation
from tenon.registry.entry import EntryDraft
from tenon.registry.entry_files import TEMPLATE_NAME
from tests.serve.house import House, Running, make_house, serving

OWN = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
ASKED: Any = [{"role": "user", "content": "the lake"}]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    """Adapters with something of their own: `dressed` a template, `shy` defaults, `brief` stop tokens."""
    made = make_house(tmp_path_factory.mktemp("travels"))
    own = made.renderer.with_template(OWN)
    made.register("dressed", rank=3, seed=70, template_hash=own.template_hash, beside={TEMPLATE_NAME: OWN.encode()})
    made.register("untold", rank=3, seed=71, beside={TEMPLATE_NAME: OWN.encode()})
    made.register("shy", rank=2, seed=72, generation=Generation(temperature=0, max_tokens=7))
    return made


@pytest.fixture(scope="module")
def running(house: House) -> Iterator[Running]:
    with serving(house, slots=4) as started:
        yield started


def chat(client: OpenAI, model: str, **fields: Any) -> Any:
    return client.chat.completions.create(model=model, messages=ASKED, **{"max_tokens": 12, **fields})


@pytest.mark.parametrize("name", ["dressed", "untold"])
def test_p11_an_adapter_is_asked_with_its_own_template(house: House, client: OpenAI, name: str) -> None:
    prompts = {template: house.renderer.with_template(template).prompt(ASKED) for template in (OWN, None)}
    assert prompts[OWN] != prompts[None]
    (wanted,) = house.expected([prompts[OWN]], [name], max_new_tokens=12)
    said = chat(client, name, temperature=0)
    assert said.choices[0].message.content == house.decode(wanted.ids)
    assert said.usage.prompt_tokens == len(prompts[OWN])
    # The others go on with the base's.
    assert chat(client, "low", temperature=0).usage.prompt_tokens == len(prompts[None])


def refused(client: OpenAI, model: str, code: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        chat(client, model)
    assert caught.value.code == code and caught.value.status_code in (400, 422)


def test_p11_a_template_that_is_not_what_it_was_is_refused(house: House, client: OpenAI) -> None:
    """Changed on disk; another one than its training's; none that can be rendered at all."""
    beside = {TEMPLATE_NAME: OWN.encode()}
    entry = house.register(
        "touched", rank=2, seed=80, template_hash=house.renderer.with_template(OWN).template_hash, beside=beside
    )
    assert chat(client, "touched").model == "touched@1"
    file = house.registry.folder(entry) / TEMPLATE_NAME
    file.write_text(OWN.replace("[", "("))
    refused(client, "touched", "adapter-damaged")
    house.register("another", rank=2, seed=81, template_hash="e" * 64, beside=beside)
    refused(client, "another", "adapter-template")
    house.register("broken", rank=2, seed=82, beside={TEMPLATE_NAME: b"{% for"})
    refused(client, "broken", "adapter-template")
    house.register("bytes", rank=2, seed=83, beside={TEMPLATE_NAME: b"\xff\xfe"})
    refused(client, "bytes", "adapter-damaged")
    assert chat(client, "dressed").model == "dressed@1", "the others go on"


def test_p35_a_template_runs_in_the_sandbox(house: House, client: OpenAI) -> None:
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    house.register("escape", rank=2, seed=84, beside={TEMPLATE_NAME: escape.encode()})
    refused(client, "escape", "data-template-failed")


def test_defaults_are_meant_where_a_request_says_nothing(house: House, client: OpenAI) -> None:
    prompt = house.renderer.prompt(ASKED)
    (wanted,) = house.expected([prompt], ["shy"], max_new_tokens=7)
    plain = client.chat.completions.create(model="shy", messages=ASKED)
    assert plain.choices[0].message.content == house.decode(wanted.ids), "greedy, and seven tokens"
    assert plain.usage is not None and plain.usage.completion_tokens == len(wanted.ids) <= 7
    long = chat(client, "shy", max_tokens=20, logprobs=True, extra_body={"ignore_eos": True})
    assert long.usage.completion_tokens == 20, "the request's own word wins"
    drawn = {chat(client, "shy", temperature=1.5, seed=seed).choices[0].message.content for seed in range(6)}
    assert len(drawn) > 1
    # /v1/completions has a default of its own, 16, which the adapter's stands before.
    text = client.completions.create(model="shy", prompt="the", extra_body={"ignore_eos": True})
    assert text.usage is not None and text.usage.completion_tokens == 7
    other = client.completions.create(model="low", prompt="the", extra_body={"ignore_eos": True})
    assert other.usage is not None and other.usage.completion_tokens == 16


def test_a_default_longer_than_the_room_is_no_error(house: House, client: OpenAI) -> None:
    house.register("wordy", rank=2, seed=85, generation=Generation(temperature=0, max_tokens=100_000))
    said = client.completions.create(model="wordy", prompt="the lake " * 20, extra_body={"ignore_eos": True})
    assert said.choices[0].finish_reason == "length"


def test_stop_texts_and_stop_tokens_travel(house: House, client: OpenAI) -> None:
    (whole,) = house.expected([house.renderer.prompt(ASKED)], ["low"], max_new_tokens=24, stop_ids=frozenset())
    text = house.decode(whole.ids)
    token = next(i for i in range(1, 24) if whole.ids[i] not in whole.ids[:i])
    piece = house.renderer.tokenizer.backend.id_to_token(whole.ids[token]) or ""
    for name, generation in (
        ("texts", Generation(temperature=0, stop=(text[3:6],))),
        ("tokens", Generation(temperature=0, stop_tokens=(piece,))),
    ):
        house.registry.register(
            name,
            house.registry.folder(house.registry.get("low")),
            EntryDraft(base_spec=house.base.spec, base_hash=house.base.base_hash, generation=generation),
        )
    cut = chat(client, "texts", max_tokens=24, extra_body={"ignore_eos": True}).choices[0]
    assert cut.message.content == text[: text.find(text[3:6])] and cut.finish_reason == "stop"
    own = chat(client, "texts", max_tokens=24, stop=[], extra_body={"ignore_eos": True}).choices[0]
    assert own.message.content == text, "an empty list says: none"
    ended = chat(client, "tokens", max_tokens=24).choices[0]
    assert ended.message.content == house.decode(whole.ids[:token]) and ended.finish_reason == "stop"


def test_a_stop_token_that_the_base_lacks_is_refused(house: House, client: OpenAI) -> None:
    house.register("odd", rank=2, seed=86, generation=Generation(stop_tokens=("<|no such token|>",)))
    refused(client, "odd", "adapter-stop-token")
