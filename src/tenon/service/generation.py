"""Answers for a file of prompts: read, generate in a worker, write in order.

This module does not know how answers are made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tenon.errors import DataError
from tenon.plan.requests import GenerateRequest, Message, Prompt
from tenon.processes import Event, ask_worker
from tenon.runs.atomic import write_file_atomic
from tenon.service.environment import require_training
from tenon.settings import Settings

_ROLES = ("system", "user", "assistant", "tool")
_SHAPE = '{"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}'


def read_prompts(path: Path, *, system: str = "") -> tuple[Prompt, ...]:
    """Prompts of a .txt file (one a line) or a .jsonl file. system: for those that bring none.

    Raises DataError data-file-missing, data-encoding, data-file-empty, data-prompt-line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError("data-encoding", f"{path}: the file is not UTF-8", hint="save it as UTF-8") from error
    except OSError as error:
        raise DataError(
            "data-file-missing", f"{path}: the prompts cannot be read", got=str(error.strerror), hint="check the path"
        ) from error
    is_json = path.suffix in (".jsonl", ".json", ".ndjson")
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise DataError("data-file-empty", f"{path}: the file holds no prompt", hint="write one prompt a line")
    return tuple(_prompt(f"{path}:{number}", line, is_json=is_json, system=system) for number, line in lines)


def generate_answers(
    request: GenerateRequest, settings: Settings, on_event: Callable[[Event], None]
) -> tuple[Event, ...]:
    """The `completion` event of every prompt, in order. on_event: told what happens meanwhile."""
    require_training()
    found: dict[int, Event] = {}
    for event in ask_worker("generate", request, settings=settings):
        if event["kind"] == "completion":
            found[int(event["index"])] = event
            on_event({"kind": "progress", "what": "answers", "done": len(found), "total": len(request.prompts)})
        else:
            on_event(event)
    return tuple(found[index] for index in sorted(found))


def write_answers(path: Path, prompts: Sequence[Prompt], answers: Sequence[Event]) -> None:
    """One JSON object a line: the prompt's messages, the answer, its tokens and why it ended. Complete or absent."""
    lines = [
        json.dumps(
            {
                "source": prompt.source,
                "messages": list(prompt.messages),
                "answer": answer["text"],
                "tokens": answer["tokens"],
                "finish": answer["finish"],
            },
            ensure_ascii=False,
        )
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file_atomic(path, ("\n".join(lines) + "\n").encode())


def _prompt(source: str, line: str, *, is_json: bool, system: str) -> Prompt:
    if not is_json:
        return _with_system(source, ({"role": "user", "content": line.rstrip("\r")},), system)
    try:
        tree: Any = json.loads(line)
    except ValueError as error:
        raise _bad_line(source, f"broken JSON: {error}") from error
    if isinstance(tree, dict) and isinstance(tree.get("prompt"), str):
        return _with_system(source, ({"role": "user", "content": tree["prompt"]},), system)
    messages = tree.get("messages") if isinstance(tree, dict) else None
    if not isinstance(messages, list) or not messages:
        raise _bad_line(source, "neither prompt nor messages")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise _bad_line(source, f"a message needs a role, one of {', '.join(_ROLES)}")
    return _with_system(source, tuple(messages), system, tools=tuple(tree.get("tools") or ()))


def _with_system(
    source: str, messages: tuple[Message, ...], system: str, *, tools: tuple[dict[str, Any], ...] = ()
) -> Prompt:
    if system and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": system}, *messages)
    return Prompt(source=source, messages=messages, tools=tools)


def _bad_line(source: str, why: str) -> DataError:
    return DataError("data-prompt-line", f"{source}: this is no prompt: {why}", hint=f"each line is {_SHAPE}")
