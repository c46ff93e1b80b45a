"""Prompts as OpenAI's API takes them: a text, token ids, or several of either. This module does not know what for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tenon.data.render import Renderer
from tenon.data.rows import Completion
from tenon.serve.api.desk import Desk


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as ids, and as the text that `echo` gives back."""

    ids: list[int]
    text: str


def read_prompts(
    desk: Desk, renderer: Renderer, given: str | Sequence[str | int | list[int]], *, param: str = "prompt"
) -> list[Prompt]:
    """The prompts of a request. param: the field that they stand in. Raises ApiError 400."""
    several = [given] if isinstance(given, str) else given
    single = [token for token in several if isinstance(token, int)]
    found = []
    for one in [single] if single else several:
        if isinstance(one, str):
            found.append(Prompt(renderer.prompt_of(Completion(one, "", param)), one))
        elif isinstance(one, list):
            desk.require_known(one, param)
            found.append(Prompt(one, renderer.tokenizer.decode(one, keep_special=True)))
    return found
