"""One chat template: compiled once, rendered in a sandbox, with the same result as transformers' apply_chat_template.

The environment follows what chat templates are written for: trimmed blocks, loop controls, a `tojson` that leaves
non-ASCII text alone, `raise_exception`, `strftime_now`, and `{% generation %}` blocks. A template comes with a base
that somebody else made, so it is data: it runs in Jinja's immutable sandbox, sees plain JSON values only, and its
arithmetic and its loops are bounded (template_limits). This module knows no tokens and no masks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from tenon.data.rows import Message
from tenon.data.template_limits import BUDGET_VARIABLE, CALL_STEPS, Budget, bounded, require_length
from tenon.errors import DataError

# Whatever a template can run into with a row that it was not written for.
RENDER_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
MARKS_VARIABLE = "tenon_generation_marks"
LONGEST_PRODUCT = 10_000_000
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, slots=True)
class Conversation:
    """What one rendering is given. now: the clock of `strftime_now`; variables: extra ones, such as enable_thinking."""

    messages: tuple[Message, ...]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    now: datetime = field(default_factory=datetime.now)

    def upto(self, count: int) -> Conversation:
        """The same conversation with only its first messages."""
        return replace(self, messages=self.messages[:count])

    def with_messages(self, messages: tuple[Message, ...]) -> Conversation:
        """The same conversation with other messages."""
        return replace(self, messages=messages)


class ChatTemplate:
    """A compiled chat template.

    has_marks: whether it says with `{% generation %}` blocks what the assistant generates.
    Raises DataError data-template-syntax when the source is no valid template.
    """

    def __init__(self, source: str, *, named_tokens: Mapping[str, str]) -> None:
        self.source = source
        self.has_marks = GENERATION_TAG.search(source) is not None
        self._named_tokens = dict(named_tokens)
        try:
            environment = _environment()
            self._template = environment.from_string(bounded(environment, source))
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                "data-template-syntax",
                f"the chat template is not valid Jinja: line {error.lineno}: {error.message}",
                hint="mend the template file, or leave data.template out to use the base's own",
            ) from error

    def render(self, chat: Conversation, *, prompt: bool = False, marks: tuple[str, str] | None = None) -> str:
        """The text of a conversation.

        prompt: ask for the generation prompt after it. marks: what to write before and after each generated block.
        Raises one of RENDER_ERRORS, which the caller knows how to blame on a row.
        """
        clock = {"strftime_now": chat.now.strftime}
        variables = {**self._named_tokens, **clock, **chat.variables}
        return self._template.render(
            {
                **variables,
                "messages": [_plain(message) for message in chat.messages],
                "tools": chat.tools,
                "documents": chat.documents,
                "add_generation_prompt": prompt,
                MARKS_VARIABLE: marks,
                BUDGET_VARIABLE: Budget(),
            }
        )


def normal_messages(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Messages as transformers hands them to templates: no null values, reasoning under every name in use."""
    found: list[Message] = []
    for message in messages:
        kept = {key: value for key, value in message.items() if value is not None}
        reasoning = next((kept[key] for key in REASONING_KEYS if key in kept), None)
        if reasoning is not None:
            kept = {"thinking": reasoning, **kept, "reasoning_content": reasoning}
        found.append(kept)
    return tuple(found)


def read_template(file: str | None) -> str | None:
    """The text of a chat template's file; None stays None. Raises DataError data-template-file."""
    if file is None:
        return None
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            "data-template-file",
            f"{file}: the chat template cannot be read: {error}",
            hint="correct data.template, or leave it out to use the base's own",
        ) from error


def _plain(value: Any) -> Any:
    """A copy made of JSON types only, so that a template can reach no method of a richer object, nor change the row."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"a message holds a {type(value).__name__}; only JSON values can be rendered")


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}`: writes its body, between marks where the rendering asks for them."""

    tags = {"generation"}  # noqa: RUF012  Jinja's own way of declaring tags

    def parse(self, parser: Parser) -> nodes.CallBlock:
        """The block as a call that gets its body as `caller`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = nodes.CallBlock(self.call_method("_write"), [], [], body)
        block.set_lineno(line)
        return block

    @jinja2.pass_context
    def _write(self, context: Context, caller: Macro) -> str:
        marks = context.get(MARKS_VARIABLE)
        body = caller()
        return body if marks is None else f"{marks[0]}{body}{marks[1]}"


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which also bounds what `*` and `**` can produce."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The product or power; raises SecurityError when it would be absurdly large."""
        if operator == "**" and not (isinstance(left, int | float) and abs(left) <= 1e6 and abs(right) <= 64):
            raise SecurityError("a chat template may not raise to such a power")
        for text, count in ((left, right), (right, left)):
            if isinstance(text, str | list | tuple) and isinstance(count, int) and len(text) * count > LONGEST_PRODUCT:
                raise SecurityError("a chat template may not repeat a text that often")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  as Jinja calls it
        """A call, which costs some steps, and one for each thing in the lists that it is given."""
        Budget.spend(__context, CALL_STEPS + sum(len(arg) for arg in args if isinstance(arg, list | tuple | range)))
        return require_length(super().call(__context, __obj, *args, **kwargs))


class _PlainNamespace(Namespace):
    """Jinja's namespace without names that start with an underscore."""

    def __init__(*args: Any, **attributes: Any) -> None:
        # The signature is Jinja's: `namespace(self=…)` is allowed in a template.
        self, rest = args[0], args[1:]
        given = dict(*rest, **attributes)
        for name in given:
            _refuse_private(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        Namespace.__setitem__(self, name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template may not set {name!r}")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["namespace"] = _PlainNamespace
    return environment


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
