"""Adapters are asked what they said when they were trained, before anybody else asks them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openai
import pytest
import torch
from openai import OpenAI
from safetensors.numpy import load_file, save_file

from tenon.adapters.bank import AdapterBank
from tenon.adapters.peft_files import load_adapter, read_adapter
from tenon.batch import NO_SLOT
from tenon.data.pack import PackRow
from tenon.infer.score import score
from tenon.registry.entry import Entry
from tenon.registry.probes import PROBES_NAME, Probe, Probes
from tenon.serve.engine.parity import Computing, judged
from tests.serve.damages import WEIGHTS, rehash
from tests.serve.house import House, Running, read_stream, serving, wait_until
from tests.tiny import CPU

PROMPTS = ([5, 40, 90, 12], [7, 3, 11, 60, 61, 62, 8], [33] * 20)
ANSWERS = ([9, 14, 2], [70], [1, 2, 3, 4, 5, 6])
TEXT = {"prompt": "the lake", "max_tokens": 4, "temperature": 0}


def probes_of(house: House, entry: Entry) -> Probes:
    """What the adapter says, as training scores it: not by the engine that serves."""
    bank = AdapterBank(house.base.facts, dtype=torch.float32, device=CPU)
    slot = load_adapter(bank, "own", read_adapter(house.registry.folder(entry)))
    rows = [
        PackRow(number, np.array([*prompt, *answer]), np.arange(len(prompt) + len(answer)) >= len(prompt))
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
        for number in (slot, NO_SLOT)
    ]
    said = [tuple(map(float, each.logprobs)) for each in score(house.decoder, bank, rows)]
    parts = zip(PROMPTS, ANSWERS, said[::2], said[1::2], strict=True)
    made = [
        Probe(prompt_ids=tuple(p), answer_ids=tuple(a), logprobs=adapter, base_logprobs=base)
        for p, a, adapter, base in parts
    ]
    return Probes(precision="fp32", base_format="dense", device="cpu", probes=tuple(made))


def changed(probes: Probes, **change: object) -> Probes:
    """The same with something else in the last probe."""
    last = probes.probes[-1].model_copy(update=change)
    return probes.model_copy(update={"probes": (*probes.probes[:-1], last)})


def register(house: House, name: str, seed: int, probes: Probes | None = None) -> Entry:
    """An adapter with what it says, or with what it is said to say. `plain` is the same one without."""
    plain = house.register(f"plain-{name}", rank=3, seed=seed)
    content = (probes or probes_of(house, plain)).to_json().encode()
    return house.register(name, rank=3, seed=seed, beside={PROBES_NAME: content})


def count(running: Running, series: str) -> float:
    text = running.ask("/metrics")[1]
    return next((float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"{series} ")), 0.0)


def test_one_that_says_what_it_said_is_served_and_asked_once(house: House) -> None:
    register(house, "sound", 301)
    with serving(house, slots=1) as running:
        answers = [running.ask("/v1/completions", {**TEXT, "model": name}) for name in ("sound", "low", "sound")]
        plain = running.ask("/v1/completions", {**TEXT, "model": "plain-sound"})
        assert [status for status, _ in (*answers, plain)] == [200] * 4
        texts = [answer["choices"][0]["text"] for _, answer in answers]
        assert texts[0] == texts[2] == plain[1]["choices"][0]["text"] != texts[1]
        # It was in its slot twice and came from memory the second time: nothing can have changed it there.
        assert count(running, "tenon_adapter_checks_total") == 1
        assert count(running, "tenon_adapter_check_refusals_total") == 0
        assert 0 < count(running, "tenon_adapter_check_seconds_total") < 5
        assert count(running, "tenon_sequences_running") == 0


def scaled(folder: Path) -> None:
    """A whole, well-formed, correctly hashed adapter that is not the one that was trained."""
    tensors = load_file(folder / WEIGHTS)
    name = max(name for name in tensors if "lora_B" in name)
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, folder / WEIGHTS)
    rehash(folder)


def spoilt(house: House, kind: str, seed: int) -> str:
    """One that no hash finds fault with."""
    name = f"spoilt-{kind}"
    if kind == "weights":
        scaled(house.registry.folder(register(house, name, seed)))
        return name
    true = probes_of(house, house.register(f"true-{kind}", rank=3, seed=seed))
    logprobs = true.probes[-1].logprobs
    changes = {
        "logprob": {"logprobs": (logprobs[0] + 0.01, *logprobs[1:])},
        "other": {"logprobs": true.probes[-1].base_logprobs},
        "token": {"prompt_ids": (10**6,)},
    }
    register(house, name, seed, changed(true, **changes[kind]))
    return name


@pytest.mark.parametrize("kind", ["weights", "logprob", "other", "token"])
def test_one_that_says_something_else_is_refused_and_other_streams_go_on(
    house: House, running: Running, client: OpenAI, kind: str
) -> None:
    name = spoilt(house, kind, 310 + len(kind))
    whole = client.completions.create(model="low", temperature=0, prompt="the lake", max_tokens=200).choices[0].text
    before = count(running, 'tenon_errors_total{code="adapter-parity"}')
    connection, stream = running.start_stream(model="low", temperature=0, max_tokens=200, ignore_eos=False)
    for _ in range(2):
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            client.completions.create(model=name, prompt="the", max_tokens=2)
        assert caught.value.code == "adapter-parity"
    said = "".join(choice["text"] for chunk in read_stream(stream) for choice in chunk["choices"])
    assert whole.endswith(said) and len(said) >= len(whole) - 10
    connection.close()
    wait_until(lambda: count(running, 'tenon_errors_total{code="adapter-parity"}') == before + 2)
    assert client.completions.create(model="high", prompt="the", max_tokens=2).choices


def test_probes_wait_in_the_batch_and_stall_nobody(house: House) -> None:
    """All rows but one are taken by streams: the adapter's probes go in between, and its request after them."""
    register(house, "patient", 330)
    with serving(house, slots=2, rows=2) as running:
        connection, stream = running.start_stream(model="low", temperature=0, max_tokens=200)
        status, _ = running.ask("/v1/completions", {**TEXT, "model": "patient"})
        assert status == 200 and count(running, "tenon_adapter_checks_total") == 1
        assert read_stream(stream)[-1]["choices"][0]["finish_reason"] == "length"
        connection.close()


def test_what_is_borne_depends_on_how_both_sides_compute() -> None:
    recorded = Probes(precision="fp32", base_format="dense", device="cpu", probes=())
    small, wide = [0.0, 0.0005, 0.01], [0.6, 0.7, 0.8]
    exact = Computing("dense", "fp32")
    assert judged([0.0, 0.0005], recorded, exact) is None and judged([], recorded, exact) is None
    assert judged(small, recorded, exact) is not None
    assert judged([float("nan")], recorded, exact) is not None
    assert judged(small, recorded, Computing("dense", "bf16")) is None
    assert judged(wide, recorded, Computing("dense", "bf16")) is not None
    assert judged(wide, recorded, Computing("nf4", "bf16")) is None
    assert judged([float("nan"), 0.0], recorded, Computing("nf4", "bf16")) is not None
    quantised = recorded.model_copy(update={"base_format": "nf4", "precision": "bf16"})
    # The same four bits on both sides leave what bf16 does; other bits do not.
    assert judged(wide, quantised, Computing("nf4", "bf16")) is not None
    assert judged(wide, quantised, Computing("dense", "bf16")) is None
