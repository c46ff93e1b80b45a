"""The task of rows told before anything is judged is the task that judging finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tenon.data.dataset import open_dataset
from tenon.evaluate.cases import find_task, find_task_early, take_cases
from tenon.plan.values import DataPlan, SourcePlan
from tenon.runs.metric_table import Task
from tenon.settings import Settings
from tests.journeys.world import TEMPLATE
from tests.tiny_bases import save_base

CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_base("llama", folder)
    calls = "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}{{ m['content'] }}{% endif %}"
    config = {"chat_template": TEMPLATE.replace("{{ m['content'] }}", calls), "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def chats(*answers: str | dict[str, Any]) -> list[dict[str, Any]]:
    said = [answer if isinstance(answer, dict) else {"role": "assistant", "content": answer} for answer in answers]
    return [{"messages": [{"role": "user", "content": f"ask {n}"}, answer]} for n, answer in enumerate(said)]


LABELLED = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
ROWS: dict[str, tuple[tuple[list[dict[str, Any]], ...], Task]] = {
    "labels": ((LABELLED,), "labels"),
    "text": ((chats("one", "two"),), "text"),
    "json": ((chats('{"a": 1}', "[2]"),), "json"),
    "json and one text": ((chats('{"a": 1}', "[2]", "three"),), "text"),
    "calls as the template writes them": ((chats('{"a": 1}', CALL),), "json"),
    "labels and chats": ((LABELLED, chats("one")), "text"),
    "labels and json": ((LABELLED, chats('{"a": 1}')), "text"),
    "plain text": (([{"text": "a house"}, {"text": "a lake"}],), "likelihood"),
    "plain text and labels": (([{"text": "a house"}], LABELLED), "labels"),
    "prompt and completion": (([{"prompt": "a", "completion": "b"}],), "text"),
    "a long text is dropped": ((chats('{"a": 1}', "long " * 100),), "json"),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_task_is_known_early(name: str, base: Path, tmp_path: Path, settings: Settings) -> None:
    parts, task = ROWS[name]
    sources = []
    for number, rows in enumerate(parts):
        sources.append(SourcePlan(path=str(tmp_path / f"{number}.jsonl")))
        Path(sources[-1].path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = DataPlan(
        train=tuple(sources),
        max_tokens=100,
        on_long="drop",
        on_bad="stop",
        on_duplicate="keep",
        supervise="assistant",
        shuffle=False,
    )
    with open_dataset(plan, base_folder=base, settings=settings) as dataset:
        cases, _ = take_cases(dataset.train, dataset.renderer)
        assert find_task(cases) == find_task_early(dataset.train, dataset.renderer) == task
