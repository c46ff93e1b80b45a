"""Recorded probes: what an adapter said when it was trained, so that a server can tell whether it still says it.

A few rows of its data as token ids, with the log probabilities that the adapter gave their answers, and those of the
bare base beside them: how far the two lie apart says what an adapter that is not applied would look like.
This module does not know how likelihoods are computed, nor where probes are kept.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tenon.plan.values import BaseFormat, Precision
from tenon.values import Value

PROBES_NAME = "probes.json"
MOST_PROBES = 64
# A probe is a window of its row: so many tokens of its answer, and the last ones before it up to so many in all.
WINDOW_TOKENS = 128
ANSWER_TOKENS = 32


class Probe(Value):
    """One row, or the part of it around its answer. logprobs: nats, of each answer token given all tokens before it
    (teacher-forced), by the adapter; base_logprobs: by the bare base.
    """

    prompt_ids: tuple[int, ...] = Field(min_length=1, max_length=WINDOW_TOKENS)
    answer_ids: tuple[int, ...] = Field(min_length=1, max_length=ANSWER_TOKENS)
    logprobs: tuple[float, ...]
    base_logprobs: tuple[float, ...]

    @model_validator(mode="after")
    def _one_a_token(self) -> Probe:
        if not len(self.answer_ids) == len(self.logprobs) == len(self.base_logprobs):
            raise ValueError("there is one log probability for each token of the answer")
        if min(*self.prompt_ids, *self.answer_ids) < 0:
            raise ValueError("token ids are not negative")
        return self


class Probes(Value):
    """The probes of one version, and how they were computed: see `plan.values.Plan` for the words."""

    version: Literal[1] = 1
    precision: Precision
    base_format: BaseFormat
    device: Literal["cpu", "cuda"]
    probes: tuple[Probe, ...] = Field(max_length=MOST_PROBES)
