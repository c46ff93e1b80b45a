"""One job on its way through engines that may be lost: what it has said, where it is, whether it is tried again.

A draw is a function of seed and position, so whichever engine goes on after what is said says what the first one would
have said. Where an engine cannot go on from there, it begins again, and what is said already is compared and not told
twice. This module does not know processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from tenon.errors import RunError, TenonError
from tenon.infer.requests import Completion, Request, Token
from tenon.serve.jobs import Ended, Job
from tenon.serve.pool.replica import Replica

# A job that two engines were lost with, before either said a word of it, is what they were lost by.
_MOST_STRIKES = 2
# However it came about: nobody is moved for ever.
_MOST_LOSSES = 4


@dataclass(slots=True, eq=False)
class Flight:
    """since: when it was submitted, in seconds. number: what the job is called on its engine. began: it had its place
    once, anywhere; placed: on its present engine, which it went to at `boarded`. cancelled: nobody waits for more.
    heard: tokens that its present engine has told. strikes, losses: of engines that were lost with it.
    """

    job: Job
    since: float
    number: int = -1
    replica: Replica | None = None
    began: bool = False
    placed: bool = False
    cancelled: bool = False
    boarded: float = 0.0
    heard: int = 0
    strikes: int = 0
    losses: int = 0
    said: list[Token] = field(default_factory=list)
    _again: int = 0

    def over(self) -> Completion | None:
        """The answer, where no engine is needed for more: nobody wants it, or its engine was lost at its very end."""
        if self.cancelled:
            return self.complete(Completion((), (), "cancelled"))
        if self.said and len(self.said) >= self.job.request.max_new_tokens and not self.job.request.prompt_logprobs:
            return self.complete(Completion((), (), "length"))
        return None

    def board(self, number: int, replica: Replica, now: float) -> Request:
        """It goes to an engine under a number there; what that is asked for."""
        self.number, self.replica, self.placed, self.heard, self.boarded = number, replica, False, 0, now
        request = self.job.request
        self._again = 0
        if not self.said:
            return request
        if request.prompt_logprobs or request.draft_ids:
            self._again = len(self.said)
            return request
        return replace(request, answered=tuple((token.id, token.logprob) for token in self.said))

    def leave(self) -> None:
        """It has no engine any more."""
        self.replica, self.placed = None, False

    def hear(self, token: Token) -> Token | None:
        """Take a token; None when it was told before. Raises RunError run-engine-differs."""
        at = self.heard
        self.heard += 1
        if at >= self._again:
            self.said.append(token)
            return token
        if self.said[at].id != token.id:
            raise RunError(
                "run-engine-differs",
                "the engine of this answer was lost, and another one does not say the same",
                hint="ask again; engines of one server have to run on alike GPUs",
            )
        return None

    def end(self, ended: Ended) -> Ended:
        """Its end as the front tells it: with all that was said, and what it waited before it came to its engine."""
        waits = ended.waits
        if waits is not None:
            waits = replace(waits, place_seconds=waits.place_seconds + self.boarded - self.since)
        return Ended(self.complete(ended.completion), waits)

    def complete(self, completion: Completion) -> Completion:
        """An answer's end with all that was said."""
        ids, logprobs = tuple(t.id for t in self.said), tuple(t.logprob for t in self.said)
        return replace(completion, ids=ids, logprobs=logprobs)

    def strike(self, why: TenonError, *, suspect: bool) -> RunError | None:
        """Its engine was lost. Why it is not tried again, or None when it is. suspect: it may be what did it."""
        self.losses += 1
        self.strikes += suspect
        if self.strikes < _MOST_STRIKES and self.losses < _MOST_LOSSES:
            return None
        return RunError(
            "run-request-fatal",
            f"{self.losses} engines were lost while they worked at this request; it is not tried again",
            got=why.code,
            hint="ask for something else; the server's log says how the engines ended",
        )

    def describe(self) -> str:
        """What a log may say of it: no text, no tokens."""
        who = "the base" if self.job.adapter is None else self.job.adapter.label
        return (
            f"a request for {who} with {len(self.job.request.prompt_ids)} tokens in its prompt, {len(self.said)} of at "
            f"most {self.job.request.max_new_tokens} in its answer, seed {self.job.request.seed}"
        )


def suspects(flights: list[Flight]) -> list[Flight]:
    """Of those whose engine was lost, who may have done it: whoever it had told nothing of; if nobody, all."""
    return [flight for flight in flights if not flight.heard] or flights
