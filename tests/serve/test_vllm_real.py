"""A real vLLM behind `tenon serve`, asked by OpenAI's client: the embedded base, adapters, and the end.

It needs .venvs/vllm (`make vllm`). What it answers is held against Tenon's own engine.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from openai import BadRequestError, OpenAI

from benchmarks.serving_adapters import BASE, make_adapters
from benchmarks.serving_vllm import PYTHON
from tenon.adapters.bank import AdapterBank
from tenon.adapters.peft_files import load_adapter, read_adapter
from tenon.batch import NO_SLOT
from tenon.infer.generate import generate
from tenon.infer.requests import Request
from tenon.pipeline.base import find_base
from tenon.pipeline.engine import load_workbench
from tenon.service.bases import describe_base
from tests.plan.situations import CPU as MACHINE
from tests.serve.house import House, wait_until
from tests.serve.test_process import command
from tests.tiny import CPU

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not PYTHON.is_file(), reason="there is no vLLM in .venvs/vllm; make it: make vllm"),
]
PROMPT = "The customer asked why the card payment had been declined, and the bank answered that"


@dataclass(frozen=True, slots=True)
class Real:
    """A server with a real vLLM. expected: what our own engine answers, by adapter (None: the base)."""

    client: OpenAI
    url: str
    names: list[str]
    expected: Any


@pytest.fixture(scope="module")
def real(house: House, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    settings = house.world.settings
    made = make_adapters(tmp_path_factory.mktemp("made"), ranks=(4, 24, 8), settings=settings)
    base = describe_base(BASE, settings)
    bench = load_workbench(find_base(base, settings), base, MACHINE, "fp32")
    bank = AdapterBank(base.facts, dtype=torch.float32, device=CPU)
    slots = {None: NO_SLOT} | {one.name: load_adapter(bank, one.name, read_adapter(one.folder)) for one in made}
    renderer = bench.renderer(None)

    def expected(name: str | None, **fields: Any) -> tuple[str, tuple[float, ...]]:
        request = Request(renderer.tokenizer.encode(PROMPT), slot=slots[name], stop_ids=renderer.stop_ids, **fields)
        (found,) = generate(bench.decoder, bank, [request])
        return renderer.tokenizer.decode(found.ids), found.logprobs

    words = (BASE, "--engine", "vllm", "--engine-python", str(PYTHON), "--slots", "2", "--cache", "256MB")
    with command(house, *words) as (process, ready):
        with OpenAI(base_url=f"{ready['url']}/v1", api_key="none", max_retries=0, timeout=600) as client:
            yield Real(client, ready["url"], [one.name for one in made], expected)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


def ask(real: Real, name: str | None, **fields: Any) -> Any:
    return real.client.completions.create(
        model=name or "base", prompt=PROMPT, temperature=0, max_tokens=24, logprobs=0, **fields
    )


def test_base_and_adapters_say_what_our_own_engine_says(real: Real) -> None:
    texts = set()
    for name in (None, *real.names[:2]):
        found = ask(real, name)
        text, logprobs = real.expected(name, max_new_tokens=24)
        assert found.choices[0].text == text
        assert found.choices[0].logprobs.token_logprobs == pytest.approx(logprobs, abs=1e-3)
        texts.add(text)
    assert len(texts) == 3


def test_penalties_and_biases_mean_the_same(real: Real) -> None:
    fields = {"presence_penalty": 0.8, "frequency_penalty": 0.6}
    biased = {"logit_bias": {"260": -100.0}, **fields}
    found = ask(real, real.names[0], **biased, extra_body={"repetition_penalty": 1.2})
    mine = {"logit_bias": ((260, -100.0),), "repetition_penalty": 1.2, **fields}
    text, logprobs = real.expected(real.names[0], max_new_tokens=24, **mine)
    assert found.choices[0].text == text
    assert found.choices[0].logprobs.token_logprobs == pytest.approx(logprobs, abs=1e-3)


def test_a_stream_has_the_same_text_and_a_chat_the_template(real: Real) -> None:
    chunks = list(
        real.client.completions.create(model=real.names[0], prompt=PROMPT, temperature=0, max_tokens=24, stream=True)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == real.expected(real.names[0], max_new_tokens=24)[0]
    assert len(chunks) > 5
    said = real.client.chat.completions.create(
        model="base",
        messages=[{"role": "user", "content": "Say hello."}],
        max_tokens=8,
        temperature=0,
        n=2,
        logprobs=True,
    )
    assert said.choices[0].message.content == said.choices[1].message.content
    assert said.choices[0].logprobs is not None and said.choices[0].logprobs.content
    drawn = [ask(real, None, seed=7, extra_body={"temperature": 1.0}).choices[0].text for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_whoever_goes_away_is_not_answered_further(real: Real) -> None:
    stream = real.client.completions.create(
        model=real.names[0], prompt=PROMPT, max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    wait_until(lambda: "tenon_sequences_running 0.0" in metrics(real), seconds=60)
    assert "tenon_adapter_loads" in metrics(real)


def test_the_third_adapter_takes_the_place_of_the_one_idle_for_longest(real: Real) -> None:
    first, second, third = real.names
    for name in (first, second, third):
        ask(real, name)
    states = {model.id: model.model_dump()["state"] for model in real.client.models.list()}
    assert [states[name] for name in (first, second, third)] == ["on disk", "resident", "resident"]
    began = time.monotonic()
    assert ask(real, first).choices[0].text == real.expected(first, max_new_tokens=24)[0]
    assert time.monotonic() - began < 60


def test_what_vllm_does_not_take_is_the_requests_fault(real: Real) -> None:
    with pytest.raises(BadRequestError, match="vLLM does not take this request"):
        real.client.embeddings.create(model="base", input="hello")
    with pytest.raises(BadRequestError, match="prompt_logprobs"):
        real.client.completions.create(model="base", prompt=PROMPT, max_tokens=1, echo=True, logprobs=2)


def metrics(real: Real) -> str:
    import httpx

    return httpx.get(f"{real.url}/metrics").text
