"""Rows to token ids with their loss mask: the one renderer of training, evaluation and serving.

Ids are those of transformers' `apply_chat_template` on the same messages. The mask is found in the rendered text
(see spans) and carried over to tokens by their characters: a token is supervised when it starts inside a supervised
span, so one that straddles the end of the prompt is not. Every row's last supervised token is a stop token. This
module does not know files, lengths or batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import Any, Literal

from tenon.data.habits import Habits, learn_habits
from tenon.data.literals import Literals
from tenon.data.rows import Chat, Completion, Message, Row, Text
from tenon.data.spans import Found, Span, TurnFinder
from tenon.data.template import RENDER_ERRORS, ChatTemplate, Conversation, normal_messages
from tenon.data.tokenizer import DEFAULT_TEMPLATE, TOOL_TEMPLATE, ChatTokenizer, Encoded
from tenon.errors import DataError
from tenon.values import canonical_json, hash_text

Supervise = Literal["assistant", "last", "all"]

# A function that no conversation has.
_PROBE = "tenon_probe"

NOTE_EOS = "the template ends the assistant's turn without a stop token: the end-of-sequence token was appended"
NOTE_CUT = "the template has no stop token between turns: what comes after the last supervised turn was left out"
NOTE_UNFORETOLD = "the generation prompt for a supervised turn holds text that the turn itself does not have"
NOTE_PARTLY = "the template leaves out something that a message says"
NOTE_STRADDLE = "a token lies across the border of a supervised turn and is not supervised"


@dataclass(frozen=True, slots=True)
class Rendered:
    """Token ids of one row, whether each is supervised, and what was unusual about it."""

    ids: list[int]
    supervised: list[bool]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Draft:
    """A rendered chat before it is encoded: its text, the spans to supervise, and whether a stop must be appended."""

    text: str
    spans: tuple[Span, ...]
    append_eos: bool
    notes: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class _Voice:
    """One compiled template with its habits."""

    template: ChatTemplate
    habits: Habits
    finder: TurnFinder = field(repr=False)


class Renderer:
    """Renders rows with one tokenizer and one chat template.

    template (`given_template`): source of a chat template instead of the tokenizer's. supervise: `assistant` (every
    assistant turn), `last` (the last one), `all` (every token up to the last stop). system: put first in chats that
    have no system message. variables: passed to the template, such as enable_thinking. now: clock of templates that
    write the date; by default the moment of each rendering, so give it to make renderings repeatable.
    Raises DataError data-template-syntax.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        template: str | None = None,
        supervise: Supervise = "assistant",
        system: str | None = None,
        *,
        variables: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.given_template = template
        self.supervise: Supervise = supervise
        self.system = system
        self._variables = dict(variables or {})
        self._now = now
        self._sources = dict(tokenizer.templates) if template is None else {DEFAULT_TEMPLATE: template}
        self._voices = {name: self._voice(source) for name, source in self._sources.items()}

    def adapted(self, *, system: str | None, now: datetime | None) -> Renderer:
        """The same tokenizer and template with another system message and clock."""
        other = copy(self)
        other.system, other._now = system, now
        return other

    def with_template(self, template: str | None) -> Renderer:
        """The same tokenizer, system message and clock with another template; None: the tokenizer's own.

        Raises DataError data-template-syntax.
        """
        return Renderer(self.tokenizer, template, self.supervise, self.system, variables=self._variables, now=self._now)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a turn: those the template writes, the tokenizer's EOS, and those the base declares."""
        texts = {text for voice in self._voices.values() for text in voice.habits.own_stops}
        found = {self.tokenizer.token_id(text) for text in texts} | {self.tokenizer.eos_id}
        return frozenset(index for index in found if index is not None) | self.tokenizer.declared_stop_ids

    @cached_property
    def template_hash(self) -> str:
        """SHA-256 of the template texts and the special tokens they are given, 64 hex digits."""
        tokens = dict(self.tokenizer.named_tokens)
        return hash_text(canonical_json({"templates": self._sources, "tokens": tokens}))

    @cached_property
    def tool_template(self) -> str | None:
        """The source of the template that conversations with tools are rendered with; None where it writes no tools."""
        name = TOOL_TEMPLATE if TOOL_TEMPLATE in self._voices else DEFAULT_TEMPLATE
        if name not in self._voices:
            return None
        empty = {"type": "object", "properties": {}, "required": []}
        function = {"name": _PROBE, "description": "", "parameters": empty}
        chat = self._conversation([{"role": "user", "content": "a"}], [{"type": "function", "function": function}])
        try:
            text = self._voices[name].template.render(chat, prompt=True)
        except RENDER_ERRORS:
            return None
        return self._sources[name] if _PROBE in text else None

    def render(self, row: Row) -> Rendered:
        """Ids and mask of one row.

        Raises DataError: data-template-missing, data-template-failed, data-template-unmaskable, data-template-ignores,
        data-no-assistant,         data-nothing-supervised, data-no-stop.
        """
        if isinstance(row, Text):
            return self._text(row)
        if isinstance(row, Completion):
            return self._completion(row)
        draft = self._draft(row)
        return self._finish(draft, self.tokenizer.encode_with_offsets(draft.text))

    def render_many(self, rows: Sequence[Row]) -> list[Rendered | DataError]:
        """`render` for each row, encoding chats together; a row's error stands in its place."""
        found: list[Rendered | DataError | _Draft] = []
        for row in rows:
            try:
                found.append(self._draft(row) if isinstance(row, Chat) else self.render(row))
            except DataError as error:
                found.append(error)
        drafts = [one for one in found if isinstance(one, _Draft)]
        encoded = iter(self.tokenizer.encode_batch([draft.text for draft in drafts]))
        done: list[Rendered | DataError] = []
        for one in found:
            try:
                done.append(self._finish(one, next(encoded)) if isinstance(one, _Draft) else one)
            except DataError as error:
                done.append(error)
        return done

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        *,
        source: str = "the request",
        literal: bool = False,
    ) -> list[int]:
        """Ids that the model continues with the assistant's next turn: what stands before that turn in training.

        literal: what messages and tools say stays text where it spells a control token, as the words of strangers must.
        Raises DataError data-template-missing, data-template-failed or data-control-text, naming `source`.
        """
        if literal and self._literals.spelt_in(messages, tools):
            return self._literal_prompt(messages, tools, source)
        voice = self._voice_for(tools, source)
        text = self._plain(voice, self._conversation(messages, tools), source, prompt=True)
        return self.tokenizer.encode_opening(text + voice.habits.missing_header)

    def whole(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        *,
        source: str = "the request",
    ) -> list[int]:
        """Ids of a conversation as it stands, with no turn opened after it. Raises as `prompt`."""
        voice = self._voice_for(tools, source)
        return self.tokenizer.encode(self._plain(voice, self._conversation(messages, tools), source))

    def _literal_prompt(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, source: str
    ) -> list[int]:
        """The prompt of messages that spell control tokens."""
        literals = self._literals
        literals.require_none_private(messages, tools)
        hidden = None if tools is None else [literals.hide(tool) for tool in tools]
        voice = self._voice_for(tools, source)
        chat = self._conversation([literals.hide(message) for message in messages], hidden)
        text = self._plain(voice, chat, source, prompt=True)
        return literals.encode_opening(text + voice.habits.missing_header, source)

    @cached_property
    def _literals(self) -> Literals:
        return Literals(self.tokenizer)

    def prompt_of(self, row: Row) -> list[int]:
        """The prompt of a row: a chat up to its last assistant turn, the prompt of a completion, nothing of a text."""
        if isinstance(row, Text):
            return self._bos()
        if isinstance(row, Completion):
            return self._bos(row.prompt) + self.tokenizer.encode(row.prompt)
        last = max((number for number, message in enumerate(row.messages) if _speaks(message)), default=None)
        return self.prompt(row.messages[:last], row.tools, source=row.source)

    def _voice(self, source: str) -> _Voice:
        template = ChatTemplate(source, named_tokens=self.tokenizer.named_tokens)
        added = {token.content: token.special for token in self.tokenizer.added_tokens.values()}
        ids = self.tokenizer.declared_stop_ids | {self.tokenizer.eos_id}
        declared = {self.tokenizer.backend.id_to_token(index) for index in ids if index is not None}
        known = frozenset(text for text in declared if text in added)
        habits = learn_habits(template, added=added, declared=known)
        return _Voice(template, habits, TurnFinder(template, habits))

    def _voice_for(self, tools: Sequence[dict[str, Any]] | None, source: str) -> _Voice:
        wanted = TOOL_TEMPLATE if tools is not None and TOOL_TEMPLATE in self._voices else DEFAULT_TEMPLATE
        if wanted not in self._voices:
            raise DataError(
                "data-template-missing",
                f"{source}: the base has no chat template, and the row is a chat",
                got=f"templates named {', '.join(self._voices)}" if self._voices else "",
                hint="set data.template to a template file, or bring prompt/completion rows",
            )
        return self._voices[wanted]

    def _conversation(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> Conversation:
        given = normal_messages(tuple(messages))
        if self._adds_system(given) and self.system is not None:
            given = ({"role": "system", "content": self.system}, *given)
        return Conversation(
            messages=given,
            tools=None if tools is None else list(tools),
            variables=self._variables,
            now=self._now or datetime.now(),
        )

    def _adds_system(self, messages: Sequence[Message]) -> bool:
        own = any(message.get("role") in ("system", "developer") for message in messages)
        return self.system is not None and not own

    def _plain(self, voice: _Voice, chat: Conversation, source: str, *, prompt: bool = False) -> str:
        try:
            return voice.template.render(chat, prompt=prompt)
        except RENDER_ERRORS as error:
            roles = ", ".join(str(message.get("role")) for message in chat.messages)
            raise DataError(
                "data-template-failed",
                f"{source}: the chat template refuses the row: {error}",
                got=f"roles {roles}",
                hint="change the row, name another template with data.template, or set data.on_bad: drop",
            ) from error

    def _draft(self, row: Chat) -> _Draft:
        voice = self._voice_for(row.tools, row.source)
        chat = self._conversation(row.messages, row.tools)
        if self.supervise == "all":
            return self._draft_of_all(row, self._plain(voice, chat, row.source))
        shift = int(self._adds_system(row.messages))
        wanted = self._wanted(row, shift)
        plain = self._plain(voice, chat, row.source)
        found = self._found(voice, chat, plain, row.source, wanted)
        last = found.turns[-1]
        notes = [NOTE_UNFORETOLD] if any(not turn.foretold for turn in found.turns) else []
        notes += [NOTE_PARTLY] if found.partly else []
        if not last.stopped and last.message + 1 < len(chat.messages):
            chat = chat.upto(last.message + 1)
            plain = self._plain(voice, chat, row.source)
            found = self._found(voice, chat, plain, row.source, [number for number in wanted if number <= last.message])
            notes.append(NOTE_CUT)
        turns = found.turns
        spans = tuple(span for turn in turns for span in turn.spans)
        return _Draft(plain, spans, not turns[-1].stopped, tuple(notes), row.source)

    def _draft_of_all(self, row: Chat, plain: str) -> _Draft:
        """Every token up to the last stop token, which only space may follow; else one is appended."""
        body = plain.rstrip()
        ended = any(body.endswith(stop) for stop in self._stop_texts)
        return _Draft(plain, ((0, len(body) if ended else len(plain)),), not ended, (), row.source)

    @cached_property
    def _stop_texts(self) -> list[str]:
        return [self.tokenizer.backend.id_to_token(index) or "" for index in sorted(self.stop_ids)]

    def _wanted(self, row: Chat, shift: int) -> list[int]:
        """Numbers of the assistant messages to supervise, in the conversation as it is rendered."""
        spoken = [number for number, message in enumerate(row.messages) if _speaks(message)]
        if not spoken:
            raise DataError(
                "data-no-assistant",
                f"{row.source}: the row has no assistant turn",
                got="roles " + ", ".join(str(message.get("role")) for message in row.messages),
                hint="add an assistant message, or set data.on_bad: drop",
            )
        chosen = spoken[-1:] if self.supervise == "last" else spoken
        wanted = [number + shift for number in chosen if number not in row.muted]
        if not wanted:
            raise _nothing_supervised(row.source, "every assistant turn that could be supervised has weight 0")
        return wanted

    def _found(self, voice: _Voice, chat: Conversation, plain: str, source: str, wanted: Sequence[int]) -> Found:
        found = voice.finder.find(chat, plain, wanted)
        if found is None:
            raise _unmaskable(source, "what the assistant says cannot be told apart in this template's text")
        if found.mute:
            keys = ", ".join(sorted(chat.messages[found.mute[0]].keys() - {"role"}))
            raise DataError(
                "data-template-ignores",
                f"{source}: the chat template leaves out all that the assistant says in message {found.mute[0] + 1}",
                got=f"a message with {keys}",
                hint="name a template that writes such messages with data.template, or set data.on_bad: drop",
            )
        turns = [turn for turn in found.turns if turn.spans]
        if not turns:
            raise _nothing_supervised(source, "no assistant turn lies in a {% generation %} block")
        return replace(found, turns=turns)

    def _finish(self, draft: _Draft, encoded: Encoded) -> Rendered:
        supervised = [False] * len(encoded.ids)
        straddled = False
        for start, end in draft.spans:
            first, stop = encoded.first_from(start), encoded.first_from(end)
            straddled |= first > 0 and encoded.ends[first - 1] > start
            if stop > first and encoded.ends[stop - 1] > end and encoded.ids[stop - 1] not in self.stop_ids:
                # Text of the template after the turn is in this token. (A stop token may swallow the space after it.)
                straddled, stop = True, stop - 1
            supervised[first:stop] = [True] * (stop - first)
        notes = (*draft.notes, NOTE_STRADDLE) if straddled else draft.notes
        if True not in supervised and not draft.append_eos:
            raise _nothing_supervised(draft.source, "the supervised text has no token of its own")
        last = len(supervised) - 1 - supervised[::-1].index(True) if True in supervised else -1
        ids = encoded.ids
        if draft.append_eos:
            # The template's own end of the text, if any, leads up to the EOS: it is supervised with it.
            ids = [*ids, self._eos(draft.source)]
            supervised[last + 1 :] = [True] * (len(ids) - last - 1)
            notes = (*notes, NOTE_EOS)
        elif ids[last] not in self.stop_ids:
            raise _unmaskable(draft.source, "the text that ends a turn is not a token of its own")
        return Rendered(ids, supervised, notes)

    def _eos(self, source: str) -> int:
        if self.tokenizer.eos_id is None:
            raise DataError(
                "data-no-stop",
                f"{source}: neither the chat template nor the tokenizer has a token that ends a turn",
                hint="set eos_token in the base's tokenizer_config.json",
            )
        return self.tokenizer.eos_id

    def _bos(self, text: str = "") -> list[int]:
        """The BOS where the tokenizer puts one before plain text, unless the text has it already."""
        bos = self.tokenizer.bos_id
        has_it = text.startswith(self.tokenizer.named_tokens.get("bos_token", "\0"))
        return [] if bos is None or not self.tokenizer.adds_bos or has_it else [bos]

    def _text(self, row: Text) -> Rendered:
        ids = self._with_stop(self._bos(row.text) + self.tokenizer.encode(row.text), row.source)
        return Rendered(ids, [True] * len(ids))

    def _completion(self, row: Completion) -> Rendered:
        prompt = self.prompt_of(row)
        joint = self._bos(row.prompt) + self.tokenizer.encode(row.prompt + row.completion)
        # Encoded together, the completion's first token may reach into the prompt; then the two are encoded apart.
        apart = joint[: len(prompt)] != prompt
        rest = self.tokenizer.encode_continuation(row.completion) if apart else joint[len(prompt) :]
        ids = self._with_stop(rest, row.source)
        return Rendered(prompt + ids, [False] * len(prompt) + [True] * len(ids))

    def _with_stop(self, ids: list[int], source: str) -> list[int]:
        return ids if ids and ids[-1] in self.stop_ids else [*ids, self._eos(source)]


def _speaks(message: Message) -> bool:
    return message.get("role") == "assistant"


def _unmaskable(source: str, why: str) -> DataError:
    return DataError(
        "data-template-unmaskable",
        f"{source}: no exact loss mask for this chat template: {why}",
        hint="put {% generation %} … {% endgeneration %} around what the assistant says in a copy of the template, "
        "and name it with data.template (docs/templates.md)",
    )


def _nothing_supervised(source: str, why: str) -> DataError:
    return DataError(
        "data-nothing-supervised",
        f"{source}: the row has no supervised token: {why}",
        hint="set data.supervise, change the row, or set data.on_bad: drop",
    )
