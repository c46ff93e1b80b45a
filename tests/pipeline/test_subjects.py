"""Subjects over a resident base: asked as they were trained, and refused where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tenon.data.rows import Chat
from tenon.data.tokens import Rendering
from tenon.errors import AdapterError, BaseModelError, DataError, PlanError
from tenon.pipeline.base import find_base
from tenon.pipeline.engine import load_workbench
from tenon.pipeline.subjects import Subjects
from tenon.pipeline.talking import answer_prompts
from tenon.plan.requests import Engine, GenerateRequest, Prompt, Sampling, Subject
from tenon.plan.values import BasePlan
from tenon.service.bases import describe_base
from tests.journeys.world import World, make_world
from tests.plan.situations import CPU, H100

SYSTEM = "Answer in capitals."
ASKED = ({"role": "user", "content": "the house"},)
# A template that writes the date, as Llama 3's does.
DATED = (
    "{{ strftime_now('%d %B %Y') }}\n{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_world(tmp_path_factory.mktemp("subjects") / "world", rows=1)
    config = {"chat_template": DATED, "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    (made.root / "base" / "tokenizer_config.json").write_text(json.dumps(config))
    return made


@pytest.fixture(scope="module")
def base(world: World) -> BasePlan:
    return describe_base(str(world.root / "base"), world.settings)


def test_p09_an_adapter_is_asked_in_the_words_of_its_training(world: World, base: BasePlan) -> None:
    folder = find_base(base, world.settings)
    bench = load_workbench(folder, base, CPU, "fp32")
    subjects = Subjects(bench, bench.renderer(None))
    answer = {"role": "assistant", "content": "THE HOUSE"}
    trained = Rendering(folder, None, "assistant", SYSTEM, 200).renderer().render(Chat((*ASKED, answer), None, "1"))
    adapter = Subject(label="echo@1", folder="echo", system=SYSTEM)
    asked = subjects.renderer(adapter).prompt(ASKED)
    assert trained.ids[: len(asked)] == asked
    # A system message of the conversation's own stands instead, and the bare base gets neither it nor the old date.
    own = ({"role": "system", "content": "Whisper."}, *ASKED)
    text = subjects.renderer(adapter).tokenizer.decode
    assert SYSTEM not in text(subjects.renderer(adapter).prompt(own))
    bare = text(subjects.renderer(Subject(label="base")).prompt(ASKED))
    assert SYSTEM not in bare and "01 January 2026" not in bare and "01 January 2026" in text(asked)


def test_an_adapter_of_another_template_is_refused(world: World, base: BasePlan) -> None:
    bench = load_workbench(find_base(base, world.settings), base, CPU, "fp32")
    subject = Subject(label="echo@1", folder=str(world.root), template_hash="e" * 64)
    with pytest.raises(AdapterError) as caught:
        Subjects(bench, bench.renderer(None)).slot(subject)
    assert caught.value.code == "adapter-template" and "eeeeeeeeeeee" in caught.value.got


def test_p18_a_base_that_changed_since_it_was_planned_is_refused(base: BasePlan, world: World) -> None:
    with pytest.raises(BaseModelError) as caught:
        find_base(base.model_copy(update={"base_hash": "0" * 64}), world.settings)
    assert caught.value.code == "base-changed" and base.path in caught.value.what


def test_a_plan_for_a_gpu_is_refused_without_one(base: BasePlan) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(PlanError) as caught:
        load_workbench(Path(base.path), base, H100, "bf16")
    assert caught.value.code == "plan-device-missing" and "H100" in caught.value.what


def test_a_prompt_that_fills_the_context_is_named(world: World, base: BasePlan) -> None:
    long = ({"role": "user", "content": "the house " * 600},)
    prompts = (Prompt(source="p.txt:1", messages=ASKED), Prompt(source="p.txt:2", messages=long))
    engine = Engine(base=base, machine=CPU)
    request = GenerateRequest(engine=engine, subject=Subject(label="base"), prompts=prompts, sampling=Sampling())
    told: list[str] = []

    def emit(kind: str, /, **_fields: Any) -> None:
        told.append(kind)

    with pytest.raises(DataError) as caught:
        answer_prompts(request, emit, world.settings)
    assert caught.value.code == "data-prompt-too-long" and caught.value.what.startswith("p.txt:2: ")
    assert "completion" not in told
