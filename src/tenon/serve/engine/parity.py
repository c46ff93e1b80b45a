"""Whether an adapter that has just been read still says what it said when it was trained (`registry.probes`).

Its probes go through the engine as requests do, one after the other, in the passes that others' sequences run in anyway
and before any request for the adapter is let in: a pass has no more to do than with a short prompt.
This module does not know slots, turns, nor who asked for the adapter.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tenon.errors import AdapterError
from tenon.infer.requests import Completion, Request
from tenon.plan.values import BaseFormat, Precision
from tenon.registry.probes import Probe, Probes

# Computed alike, in fp32, sums differ by their order alone: no token by more than this. Nats, as all below.
_WORST = 1e-3
# Else the mean over all tokens of how far they lie apart. docs/adapters.md says what these were taken from.
_MEAN_OF_PRECISION: dict[Precision, float] = {"fp32": 0.0, "fp16": 0.02, "bf16": 0.1}
_MEAN_OF_FORMAT: dict[BaseFormat, float] = {"dense": 0.0, "int8": 0.15, "fp8": 0.5, "nf4": 1.0}


@dataclass(frozen=True, slots=True)
class Computing:
    """How an engine computes: what the frozen base is kept in, and the precision of the rest."""

    base_format: BaseFormat
    precision: Precision


@dataclass(slots=True)
class Check:
    """The probes of one adapter on their way through the engine. differences: nats, of each token heard so far."""

    key: str
    label: str
    slot: int
    probes: Probes
    number: int
    differences: list[float] = field(default_factory=list)
    asked: int = 0

    def next_request(self) -> Request | None:
        """The next probe; None after the last one."""
        if self.asked == len(self.probes.probes):
            return None
        probe = self.probes.probes[self.asked]
        self.asked += 1
        # A memory of its own: what is remembered under the adapter's name must not answer for it, nor what it says here
        # be remembered before it has passed.
        return Request(
            probe.prompt_ids,
            slot=self.slot,
            max_new_tokens=0,
            draft_ids=probe.answer_ids,
            adapter_key=self.key,
            salt=f"check {self.number}",
        )

    def hear(self, completion: Completion) -> None:
        """What the engine says of the probe that was asked last; fewer tokens where its context has no room."""
        probe = self._last
        self.differences += [
            abs(said - recorded) for said, recorded in zip(completion.draft_logprobs, probe.logprobs, strict=False)
        ]

    def verdict(self, computing: Computing) -> AdapterError | None:
        """Why the adapter is refused, if it is."""
        found = judged(self.differences, self.probes, computing)
        if found is None:
            return None
        return AdapterError(
            "adapter-parity",
            f"{self.label} no longer says what it said when it was trained",
            got=f"log probabilities of {len(self.differences)} recorded tokens differ by {found}",
            hint="use another version, or train it again",
        )

    @property
    def _last(self) -> Probe:
        return self.probes.probes[self.asked - 1]


def judged(differences: list[float], probes: Probes, computing: Computing) -> str | None:
    """None when the differences are borne; else what they are and what would be borne."""
    if not differences:
        return None
    alike = (probes.base_format, probes.precision) == (computing.base_format, computing.precision)
    if alike and computing.precision == "fp32" and computing.base_format != "fp8":
        worst = max(differences)
        return None if worst <= _WORST else f"{worst:.3g} nats, {_WORST:g} is borne"
    mean, borne = sum(differences) / len(differences), _borne_mean(probes, computing)
    return None if mean <= borne else f"{mean:.3g} nats in the mean, {borne:g} is borne"


def _borne_mean(probes: Probes, computing: Computing) -> float:
    formats = (_MEAN_OF_FORMAT[probes.base_format], _MEAN_OF_FORMAT[computing.base_format])
    precisions = (_MEAN_OF_PRECISION[probes.precision], _MEAN_OF_PRECISION[computing.precision])
    # The same quantised weights are the same numbers; fp8 rounds what they are multiplied with too.
    same = probes.base_format == computing.base_format != "fp8"
    return max(*precisions, 0.0 if same else max(formats))


def require_vocabulary(probes: Probes, vocabulary: int, label: str) -> None:
    """Refuse probes with tokens that no embedding has. Raises AdapterError adapter-parity."""
    largest = max((max(*probe.prompt_ids, *probe.answer_ids) for probe in probes.probes), default=0)
    if largest >= vocabulary:
        raise AdapterError(
            "adapter-parity",
            f"{label} was recorded with tokens that this base does not have",
            got=f"token {largest} of {vocabulary}",
            hint="use another version, or train it again",
        )
