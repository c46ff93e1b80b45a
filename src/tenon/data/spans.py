"""Where each assistant turn lies in a rendered conversation, to the character.

A turn runs from the end of the prompt that the model would be given for it, through the token that ends it. Three
ways lead there, and each result is checked against the plain rendering before it is believed:

markers  — the conversation is rendered a second time with invisible markers around what every message says. Without
           them the text must be the plain text again. The turn starts where the prompt for it (rendered from the
           messages before, markers included) ends, counted from the last marker before the turn; it ends with the
           first stop token between the turn's last marker and the next message's first one. What users write can
           therefore never be taken for a header or a stop token, and a history that a template abridges is no obstacle.
prefixes — for templates that change their mind when a marker is there: the prompt for a turn must be a prefix of the
           plain text, and the conversation up to the turn must go on like it.
blocks   — for templates that neither way understands but that mark with `{% generation %}` what is generated: one block
           for each assistant message, each widened to the stop token that follows it at once.

Where the first two succeed on a template with generation blocks, the blocks say which parts of a turn to supervise.
This module knows characters only, no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tenon.data.habits import Habits
from tenon.data.markers import (
    ALPHABETS,
    GENERATION_CLOSES,
    GENERATION_OPENS,
    Alphabet,
    Hit,
    Marking,
    unmarked_texts,
)
from tenon.data.rows import Message
from tenon.data.template import RENDER_ERRORS, ChatTemplate, Conversation

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Turn:
    """One assistant turn. message: its number. [start, end): what the model has to produce, stop token included.

    said_end: where the last thing that it says ends, at most `end`. stopped: whether a stop token is at the end;
    without one, `end` is the end of what the template writes for the turn. foretold: whether the prompt for it is word
    for word what stands before it. parts: the pieces of [start, end) to supervise, when the template says which; None
    means all of it.
    """

    message: int
    start: int
    said_end: int
    end: int
    stopped: bool
    foretold: bool
    parts: tuple[Span, ...] | None = None

    @property
    def spans(self) -> tuple[Span, ...]:
        """The character ranges to supervise."""
        return ((self.start, self.end),) if self.parts is None else self.parts


@dataclass(frozen=True, slots=True)
class Found:
    """The wanted turns, in order.

    partly: messages of which the template leaves out some text or tool call. mute: wanted ones of which it writes
    nothing.
    """

    turns: list[Turn]
    partly: tuple[int, ...] = ()
    mute: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Search:
    """A conversation on its way to its turns: the plain text, and what stood where in the marked one."""

    chat: Conversation
    plain: str
    marking: Marking
    hits: Sequence[Hit]
    repeated: frozenset[int]

    def owned(self, number: int) -> list[int]:
        """Indices of the hits that belong to a message."""
        return [index for index, hit in enumerate(self.hits) if self.marking.owner(hit) == number]


class TurnFinder:
    """Finds assistant turns in the renderings of one template."""

    def __init__(self, template: ChatTemplate, habits: Habits) -> None:
        self._template = template
        self._habits = habits

    def find(self, chat: Conversation, plain: str, wanted: Sequence[int]) -> Found | None:
        """The turns of the wanted messages; None when no way leads to a verified result.

        plain: the rendering of `chat`. wanted: numbers of assistant messages, ascending.
        """
        generated = self._generated(chat, plain) if self._template.has_marks else ()
        if generated is None:
            return None
        found = self._by_markers(chat, plain, wanted) or self._by_prefixes(chat, plain, wanted)
        if not self._template.has_marks:
            return found
        if found is None:
            turns = _by_blocks(chat, plain, wanted, generated, self._habits)
            return None if turns is None else Found(turns, mute=self._mute(chat, wanted))
        return replace(found, turns=[_restrict(turn, generated) for turn in found.turns])

    def _by_markers(self, chat: Conversation, plain: str, wanted: Sequence[int]) -> Found | None:
        alphabet = _unused_alphabet(plain)
        if alphabet is None or self._holds_stop(chat.messages):
            return None
        marking = Marking(chat.messages, alphabet)
        text = self._rendered(chat.with_messages(marking.messages)) if marking.complete else None
        if text is None:
            return None
        bare, hits = alphabet.take_out(text)
        if bare != plain:
            return None
        repeated = frozenset(marking.owner(hit) for hit in hits) if len({hit.code for hit in hits}) < len(hits) else ()
        search = _Search(chat, plain, marking, hits, frozenset(repeated))
        turns: list[Turn] = []
        for number in wanted:
            turn = self._turn_by_markers(search, number)
            if turn is None or (turns and turns[-1].end > turn.start):
                return None
            turns.append(turn)
        unsaid = marking.loud - {hit.string for hit in hits}
        return Found(turns, tuple(sorted({marking.owners[string] for string in unsaid})))

    def _rendered(self, chat: Conversation, *, prompt: bool = False) -> str | None:
        try:
            return self._template.render(chat, prompt=prompt)
        except RENDER_ERRORS:
            return None

    def _holds_stop(self, messages: tuple[Message, ...]) -> bool:
        """Whether a string that gets no markers looks like a stop token: markers cannot tell it from a real one."""
        texts = [text for message in messages for text in unmarked_texts(message)]
        return any(stop in text for text in texts for stop in self._habits.stops)

    def _turn_by_markers(self, search: _Search, number: int) -> Turn | None:
        own = search.owned(number)
        tail = ""
        if number in search.repeated and own:
            # Later messages repeat what this one says (the name of its tool, say): only its own text counts.
            own = own[: len(self._hits_upto(search, number)[1])]
        if not own or own[-1] - own[0] + 1 != len(own) or not search.hits[own[-1]].closes:
            return None
        before = search.hits[own[0] - 1] if own[0] > 0 else None
        found = self._start_by_markers(search, number, before)
        if found is None or found[0] > search.hits[own[0]].at:
            return None
        said_end = search.hits[own[-1]].at
        is_last = own[-1] + 1 == len(search.hits)
        limit = len(search.plain) if is_last else search.hits[own[-1] + 1].at
        end = self._first_stop(search.plain, said_end, limit)
        if end is not None:
            return Turn(number, found[0], said_end, end, stopped=True, foretold=found[1])
        if not is_last:
            tail = self._hits_upto(search, number)[0]
            end = said_end + len(tail) if search.plain.startswith(tail, said_end) else said_end
        return Turn(number, found[0], said_end, end or len(search.plain), stopped=False, foretold=found[1])

    def _hits_upto(self, search: _Search, number: int) -> tuple[str, list[Hit]]:
        """With nothing after a message: the text that follows what it says, and the hits that belong to it."""
        text = self._rendered(search.chat.with_messages(search.marking.messages[: number + 1]))
        bare, hits = search.marking.alphabet.take_out(text or "")
        own = [hit for hit in hits if search.marking.owner(hit) == number]
        return (bare[own[-1].at :] if own else "", own)

    def _start_by_markers(self, search: _Search, number: int, before: Hit | None) -> tuple[int, bool] | None:
        text = self._rendered(search.chat.with_messages(search.marking.messages[:number]), prompt=True)
        if text is None:
            return self._start_of_first(search) if before is None else None
        bare, hits = search.marking.alphabet.take_out(text)
        if before is None:
            return None if hits else self._match(search.plain, 0, bare) or self._start_of_first(search)
        if not hits or hits[-1].code != before.code:
            return None
        return self._match(search.plain, before.at, bare[hits[-1].at :]) or self._after_header(search.plain, before.at)

    def _start_of_first(self, search: _Search) -> tuple[int, bool] | None:
        """For a conversation that the assistant opens, where a template cannot render the nothing before it."""
        header = self._habits.generation_prompt or self._habits.missing_header
        at = search.plain.find(header, 0, search.hits[0].at) if header else -1
        return None if at < 0 else (at + len(header), True)

    def _after_header(self, plain: str, origin: int) -> tuple[int, bool] | None:
        """For templates whose generation prompt is not the header that their answers have."""
        ends = [origin + len(header) for header in self._habits.headers if plain.startswith(header, origin)]
        return (max(ends), False) if ends and max(ends) > origin else None

    def _match(self, plain: str, origin: int, bridge: str) -> tuple[int, bool] | None:
        """Where the prompt's last part ends in the plain text, and whether all of it is there."""
        bridge += self._habits.missing_header
        if plain.startswith(bridge, origin):
            return origin + len(bridge), True
        for extra in self._habits.extras:
            shorter = bridge.removesuffix(extra)
            if shorter != bridge and plain.startswith(shorter, origin):
                return origin + len(shorter), False
        return None

    def _first_stop(self, text: str, start: int, end: int) -> int | None:
        """End of the stop token that comes first in text[start:end]."""
        found = [(text.find(stop, start, end), len(stop)) for stop in self._habits.stops]
        ends = [(at, -length) for at, length in found if at >= 0]
        return None if not ends else min(ends)[0] - min(ends)[1]

    def _by_prefixes(self, chat: Conversation, plain: str, wanted: Sequence[int]) -> Found | None:
        turns: list[Turn] = []
        for number in wanted:
            turn = self._turn_by_prefixes(chat, plain, number)
            if turn is None or (turns and turns[-1].end > turn.start):
                return None
            turns.append(turn)
        return Found(turns, mute=self._mute(chat, wanted))

    def _turn_by_prefixes(self, chat: Conversation, plain: str, number: int) -> Turn | None:
        before, upto = self._rendered(chat.upto(number), prompt=True), self._rendered(chat.upto(number + 1))
        found = None if before is None else self._match(plain, 0, before)
        if found is None or upto is None or not upto.startswith(plain[: found[0]]):
            return None
        start, foretold = found
        ends = [upto.rfind(stop, start) + len(stop) for stop in self._habits.stops if stop in upto[start:]]
        ends = [end for end in ends if upto[end:] in self._habits.tails or not upto[end:].strip()]
        is_last = number + 1 == len(chat.messages)
        end = min(ends) if ends else len(upto) if is_last else len(upto.rstrip())
        if plain[start:end] != upto[start:end]:
            return None
        return Turn(number, start, end, end, stopped=bool(ends), foretold=foretold)

    def _mute(self, chat: Conversation, wanted: Sequence[int]) -> tuple[int, ...]:
        """The wanted messages that say something of which the template writes nothing."""
        marking = Marking(chat.messages, ALPHABETS[0])
        speaking = {marking.owners[string] for string in marking.loud}
        found: list[int] = []
        for number in wanted:
            messages = (*chat.messages[:number], marking.messages[number], *chat.messages[number + 1 :])
            text = self._rendered(chat.with_messages(messages))
            if number in speaking and text is not None and not ALPHABETS[0].occurs_in(text):
                found.append(number)
        return tuple(found)

    def _generated(self, chat: Conversation, plain: str) -> tuple[Span, ...] | None:
        """The character ranges of `{% generation %}` blocks, of nested ones the outermost; None when they move."""
        alphabet = _unused_alphabet(plain)
        if alphabet is None:
            return None
        try:
            text = self._template.render(chat, marks=alphabet.generation_marks)
        except RENDER_ERRORS:
            return None
        bare, hits = alphabet.take_out(text)
        spans: list[Span] = []
        opened: list[int] = []
        for hit in hits:
            if hit.code == GENERATION_OPENS:
                opened.append(hit.at)
            elif hit.code == GENERATION_CLOSES and opened:
                start = opened.pop()
                spans += [] if opened else [(start, hit.at)]
        return tuple(spans) if bare == plain else None


def _by_blocks(
    chat: Conversation, plain: str, wanted: Sequence[int], generated: Sequence[Span], habits: Habits
) -> list[Turn] | None:
    spoken = [number for number, message in enumerate(chat.messages) if message.get("role") == "assistant"]
    if len(spoken) != len(generated):
        return None
    pairs = zip(spoken, generated, strict=True)
    return [_turn_of_block(plain, number, block, habits) for number, block in pairs if number in wanted]


def _turn_of_block(plain: str, number: int, block: Span, habits: Habits) -> Turn:
    start, said_end = block
    body = plain[start:said_end].rstrip()
    if any(body.endswith(stop) for stop in habits.stops):
        return Turn(number, start, start + len(body), start + len(body), stopped=True, foretold=True)
    gap = len(plain) - len(plain[said_end:].lstrip())
    stop = next((stop for stop in habits.stops if plain.startswith(stop, gap)), None)
    if stop is not None:
        return Turn(number, start, said_end, gap + len(stop), stopped=True, foretold=True)
    end = len(plain) if gap == len(plain) else said_end
    return Turn(number, start, said_end, end, stopped=False, foretold=True)


def _unused_alphabet(text: str) -> Alphabet | None:
    return next((one for one in ALPHABETS if not one.occurs_in(text)), None)


def _restrict(turn: Turn, generated: Sequence[Span]) -> Turn:
    """The turn with only the parts that the template marks as generated, and its stop token in any case."""
    # A block around an empty answer is empty, and still says that this turn is generated.
    parts = [(max(start, turn.start), min(end, turn.end)) for start, end in generated]
    parts = [(start, end) for start, end in parts if start < end or start == end <= turn.said_end]
    if parts and turn.stopped and parts[-1][1] < turn.end:
        parts.append((max(parts[-1][1], turn.said_end), turn.end))
    return replace(turn, parts=tuple(parts))
