"""The functions of a request: how the model is told of them, what holds its calls to their schemas, how they are read.

This module does not know how an answer comes about.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from tenon.data.render import Renderer
from tenon.serve.api.protocol import ChatRequest, FunctionTool, NamedTool
from tenon.serve.http.api_errors import ApiError
from tenon.serve.text.tool_calls import CallScanner
from tenon.serve.text.tool_formats import ANY_ARGUMENTS, CallFormat, CallGrammar, Function, call_format

_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """told: functions as the chat template gets them; None: none. form: how calls are written; None: none are looked
    for. names: that may be called. grammar: writes what the answer is held to, where it is. stops: texts that end it.
    shown: special tokens that belong to calls.
    """

    told: tuple[dict[str, Any], ...] | None = None
    form: CallFormat | None = None
    names: frozenset[str] = frozenset()
    grammar: Callable[[], str] | None = None
    stops: tuple[str, ...] = ()
    shown: frozenset[int] = frozenset()

    def scanner(self) -> CallScanner | None:
        """Finds the calls in one answer; None where there are none."""
        return None if self.form is None else CallScanner(self.form, self.names)


def tool_use(body: ChatRequest, renderer: Renderer) -> ToolUse:
    """How a request's functions are used. May take a while. Raises ApiError 400 where they cannot be."""
    choice = body.tool_choice
    if not body.tools or choice == "none":
        return ToolUse()
    form = _form(renderer)
    names = [tool.function.name for tool in body.tools]
    if len(set(names)) < len(names):
        raise ApiError(400, "two functions have the same name", param="tools")
    called = [choice.function.name] if isinstance(choice, NamedTool) else names
    if not set(called) <= set(names):
        raise ApiError(400, f"tool_choice names {called[0]!r}, and tools has no such function", param="tool_choice")
    tools = [tool for tool in body.tools if tool.function.name in called]
    several = body.parallel_tool_calls is not False and not isinstance(choice, NamedTool)
    enforced = choice == "required" or isinstance(choice, NamedTool)
    grammar = _grammar(CallGrammar(form, renderer.tokenizer), tools, body, enforced=enforced, several=several)
    marks = {
        renderer.tokenizer.token_id(text) for text in (form.opens, form.closes, form.bare, "<|python_tag|>") if text
    }
    return ToolUse(
        told=tuple(tool.told() for tool in body.tools),
        form=form,
        names=frozenset(called),
        grammar=grammar,
        stops=() if several or enforced or not form.closes else (form.closes,),
        shown=frozenset(mark for mark in marks if mark in renderer.tokenizer.special_ids and mark is not None),
    )


def _form(renderer: Renderer) -> CallFormat:
    source = renderer.tool_template
    if source is None:
        raise ApiError(
            400,
            "the chat template of this base writes no tools; leave tools out, or serve with a template that does",
            param="tools",
            code="unsupported_parameter",
        )
    form = call_format(source)
    if form is None:
        raise ApiError(
            400,
            "how this base writes calls of functions is not known here; leave tools out",
            param="tools",
            code="unsupported_parameter",
        )
    return form


def _grammar(
    grammar: CallGrammar, tools: list[FunctionTool], body: ChatRequest, *, enforced: bool, several: bool
) -> Callable[[], str] | None:
    """What writes the grammar of an answer with these functions; None: nothing holds it."""
    every = [Function(tool.function.name, _schema(tool)) for tool in tools]
    if enforced:
        return partial(grammar.calls, every, several=several)
    if body.schema_asked is not None:
        return partial(grammar.calls, every, several=several, answer=body.schema_asked)
    if not any(tool.function.strict for tool in tools):
        return None
    mixed = [
        each if tool.function.strict else Function(each.name, ANY_ARGUMENTS)
        for each, tool in zip(every, tools, strict=True)
    ]
    return partial(_perhaps, grammar, mixed)


def _perhaps(grammar: CallGrammar, functions: list[Function]) -> str:
    found = grammar.perhaps(functions)
    if found is None:
        raise ApiError(
            400,
            "strict functions are kept with tool_choice required, or a named function, on this base",
            param="tools",
        )
    return found


def _schema(tool: FunctionTool) -> dict[str, Any]:
    """The schema of a function's arguments; they are an object always."""
    schema = tool.function.parameters
    if not schema:
        return _NO_ARGUMENTS
    if schema.get("type", "object") != "object":
        raise ApiError(400, f"the parameters of {tool.function.name} are no object", param="tools")
    return {"type": "object", **schema}
