"""A request in the words of vLLM's completions, and its streamed chunks as tokens. Token ids both ways, no text.

This module sends nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

from tenon.errors import RunError, TenonError, UsageError
from tenon.infer.requests import Completion, FinishReason, Request, Token

_ID_PREFIX = "token_id:"
# Fields of a request that vLLM is told, and those that only our own engine needs. Any other is refused, unless it says
# what happens anyway.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
_SAID = ("prompt_ids", "max_new_tokens", "stop_ids", "logit_bias", "seed", "top_logprobs", "prompt_logprobs", "salt")
_OWN = ("slot", "adapter_key")
_PASSED_ON = frozenset((*_SAMPLING, *_SAID, *_OWN))


def completion_body(request: Request, model: str, *, secret: str, without: Collection[str] = ()) -> dict[str, Any]:
    """The body of POST /v1/completions. model: a name that vLLM knows. secret: makes salts that nobody can guess.
    without: fields that this vLLM must not be asked for.

    Raises UsageError usage-engine for what vLLM has no words for.
    """
    for each in fields(Request):
        known = each.name in _PASSED_ON and each.name not in without
        if not known and getattr(request, each.name) != each.default:
            raise _refused(f"{each.name} is not among what vLLM is asked")
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(request.prompt_ids),
        "max_tokens": request.max_new_tokens,
        **{name: getattr(request, name) for name in _SAMPLING},
        "logit_bias": {str(token): value for token, value in request.logit_bias} or None,
        "seed": request.seed % 2**63,
        # What ends the answer is the request's alone, not what the base's files say.
        "ignore_eos": True,
        "stop_token_ids": sorted(request.stop_ids),
        "logprobs": request.top_logprobs,
        "echo": request.prompt_logprobs,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "stream": True,
    }
    if request.salt != "":
        body["cache_salt"] = hashlib.sha256(f"{secret}{request.salt!r}".encode()).hexdigest()
    return body


def refusal(status: int, answer: Mapping[str, Any]) -> TenonError:
    """The error for an answer that is none. answer: the body, `{"error": {"message": …}}` or a message alone."""
    told = answer.get("error", answer)
    message = str(told.get("message", told) if isinstance(told, Mapping) else told)[:300]
    if 400 <= status < 500:
        return _refused(message)
    return RunError("run-engine-died", "vLLM failed at this request", got=message, hint="ask again in a moment")


class Reading:
    """The answer of one request as its chunks come."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._prompt: tuple[Token, ...] = ()
        self._tokens: list[Token] = []
        self.finish: FinishReason | None = None

    @property
    def begun(self) -> bool:
        """Whether anything was given out: then the request cannot be made a second time."""
        return bool(self._tokens)

    def take(self, chunk: Mapping[str, Any]) -> Sequence[Token]:
        """The tokens that a chunk brings, without the one that ends the answer. Raises RunError, UsageError."""
        if "error" in chunk:
            raise refusal(int(chunk["error"].get("code") or 500), chunk)
        if not chunk["choices"]:
            return ()
        choice = chunk["choices"][0]
        tokens = self._read(choice["token_ids"], choice["logprobs"])
        reason = choice.get("finish_reason")
        if reason not in (None, "stop", "length"):
            raise refusal(500, {"message": f"it ended with {reason!r}"})
        if reason == "stop" and tokens and tokens[-1].id in self._request.stop_ids:
            tokens = tokens[:-1]
        self.finish = reason
        self._tokens += tokens
        return tokens

    def completion(self, finish: FinishReason) -> Completion:
        """All of it."""
        ids, logprobs = tuple(t.id for t in self._tokens), tuple(t.logprob for t in self._tokens)
        return Completion(ids, logprobs, finish, prompt=self._prompt)

    def _read(self, ids: Sequence[int], scores: Mapping[str, Any]) -> list[Token]:
        """The tokens of a chunk. An echoed prompt's scores come before those of the first tokens."""
        logprobs, tops = scores["token_logprobs"], scores["top_logprobs"]
        echoed = len(logprobs) - len(ids)
        if echoed:
            prompt = list(self._request.prompt_ids)
            # The first token follows nothing.
            self._prompt = tuple(self._token(prompt[i], logprobs[i], tops[i]) for i in range(1, echoed))
        return [self._token(ids[i], logprobs[echoed + i], tops[echoed + i]) for i in range(len(ids))]

    def _token(self, token: int, logprob: float, top: Mapping[str, float]) -> Token:
        likely = [(int(name.removeprefix(_ID_PREFIX)), value) for name, value in top.items()]
        likely.sort(key=lambda pair: (-pair[1], pair[0]))
        return Token(token, logprob, tuple(likely[: self._request.top_logprobs]))


def _refused(message: str) -> UsageError:
    return UsageError("usage-engine", "vLLM does not take this request", got=message, hint="ask without it")
