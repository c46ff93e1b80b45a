"""What a chat template does with every turn, learned once by showing it a few harmless conversations.

It is used to recognise the end of an assistant's turn and headers that a template writes but does not announce; where
a turn lies in a given row is never guessed from it alone (see spans). This module knows no rows and no ids.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tenon.data.template import RENDER_ERRORS, ChatTemplate, Conversation

QUESTION = "tenonquestion"
ANSWER = "tenonanswer"
FOLLOWUP = "tenonfollowup"
ROLES = {QUESTION: "user", ANSWER: "assistant", FOLLOWUP: "user"}


@dataclass(frozen=True, slots=True)
class Habits:
    """stops: texts of tokens that end an assistant's turn. own_stops: those that this template itself writes.

    generation_prompt: what it adds when asked for a generation prompt after a user's turn; may be empty.
    missing_header: what it writes before an answer although it leaves it out of the generation prompt.
    extras: ends of the generation prompt that the same turn does not have in a finished conversation
    (an opened thinking block, for instance), shortest first.
    tails: what follows the stop at the end of a conversation. headers: what stands between a question and its answer.
    """

    stops: frozenset[str]
    own_stops: frozenset[str]
    generation_prompt: str
    missing_header: str
    extras: tuple[str, ...]
    tails: frozenset[str]
    headers: tuple[str, ...]


def learn_habits(template: ChatTemplate, *, added: Mapping[str, bool], declared: frozenset[str]) -> Habits:
    """Habits of a template. added: text of every added token -> whether it is special; declared: known stop tokens."""
    last = _render(template, QUESTION, ANSWER)
    middle = _render(template, QUESTION, ANSWER, FOLLOWUP)
    asked, silent = _render(template, QUESTION, prompt=True), _render(template, QUESTION)
    rest = _after(last, ANSWER)
    stop = _choose_stop(rest, _before(_after(middle, ANSWER), FOLLOWUP), added, declared)
    bridge = _after(asked, QUESTION)
    headers = [_before(_after(text, QUESTION), ANSWER) for text in (last, middle) if ANSWER in text]
    generation_prompt = asked[_shared(asked, silent) :]
    missing = "" if generation_prompt else _missing_header(bridge, headers)
    extras = {bridge[_shared(bridge, header) :] for header in headers} - {""}
    # What is left of the generation prompt without an extra must still announce the assistant.
    extras = {extra for extra in extras if generation_prompt[: -len(extra)].strip()}
    own = frozenset({stop} if stop else ())
    return Habits(
        stops=own | declared,
        own_stops=own,
        generation_prompt=generation_prompt,
        missing_header=missing,
        extras=tuple(sorted(extras, key=len)),
        tails=frozenset({rest.partition(stop)[2]} if stop else ()),
        headers=tuple(dict.fromkeys(header.rstrip(" ") for header in headers)),
    )


def _missing_header(bridge: str, headers: list[str]) -> str:
    if not headers or not all(header.startswith(bridge) for header in headers):
        return ""
    # A space before the answer belongs to the answer's first token in almost every vocabulary.
    header = headers[0][len(bridge) : _shared(headers[0], headers[-1])].rstrip(" ")
    return header if header.strip() else ""


def _choose_stop(rest: str, between: str, added: Mapping[str, bool], declared: frozenset[str]) -> str | None:
    """The token that ends a turn: written after the answer both at the end and in the middle of a conversation.

    rest: text after the answer when it is last; between: text from the answer to the next question.
    """
    known = sorted({*added, *declared}, key=len, reverse=True)
    if not known:
        return None
    pattern = re.compile("|".join(map(re.escape, known)))
    at_end, in_middle = pattern.findall(rest), pattern.findall(between)
    candidates = at_end[: _shared(at_end, in_middle)] or at_end
    for ends_turn in (declared.__contains__, lambda token: added.get(token, False), lambda _: True):
        found = next(filter(ends_turn, candidates), None)
        if found is not None:
            return found
    return None


def _shared(left: Sequence[object], right: Sequence[object]) -> int:
    """Length of what two sequences begin with alike."""
    pairs = zip(left, right, strict=False)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(left), len(right)))


def _render(template: ChatTemplate, *words: str, prompt: bool = False) -> str:
    """A conversation of such words, as plain contents, or as contents in parts for templates that know only those."""
    plain = tuple({"role": ROLES[word], "content": word} for word in words)
    parts = tuple({"role": ROLES[word], "content": [{"type": "text", "text": word}]} for word in words)
    for messages in (plain, parts):
        try:
            text = template.render(Conversation(messages), prompt=prompt)
        except RENDER_ERRORS:
            continue
        if all(word in text for word in words):
            return text
    return ""


def _after(text: str, word: str) -> str:
    return text.rpartition(word)[2] if word in text else ""


def _before(text: str, word: str) -> str:
    return text.partition(word)[0]
