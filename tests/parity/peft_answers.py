"""The oracle of generation: PEFT over transformers, one prompt at a time, greedy, fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tenon.infer.requests import Completion


@dataclass(frozen=True, slots=True)
class Answer:
    """ids: of the answer. logprobs: of each, in nats."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@torch.no_grad()
def peft_answers(base: Path, adapter: Path | None, prompts: Sequence[Sequence[int]], tokens: int) -> list[Answer]:
    """What `generate` says to each prompt, always so many tokens. base: a folder in transformers' layout; adapter: of
    PEFT files, None for the bare base.
    """
    bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    # transformers' `generate` is typed for a protocol that its own classes do not meet.
    model: Any = bare if adapter is None else PeftModel.from_pretrained(bare, str(adapter)).eval()
    model.generation_config.eos_token_id = None
    found = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        told = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        said = told.sequences[0, len(prompt) :].tolist()
        scores = [torch.log_softmax(logits[0], -1) for logits in told.logits]
        found.append(Answer(tuple(said), tuple(float(row[i]) for row, i in zip(scores, said, strict=True))))
    return found


def differing_tokens(mine: Sequence[Completion], theirs: Sequence[Answer | Completion]) -> int:
    """How many tokens of all answers are not the same."""
    pairs = [pair for a, b in zip(mine, theirs, strict=True) for pair in zip(a.ids, b.ids, strict=True)]
    return sum(a != b for a, b in pairs)


def worst_logprob(mine: Sequence[Completion], theirs: Sequence[Answer | Completion]) -> float:
    """The largest difference of the log probability of a token, in nats."""
    pairs = [pair for a, b in zip(mine, theirs, strict=True) for pair in zip(a.logprobs, b.logprobs, strict=True)]
    return max(abs(a - b) for a, b in pairs)
