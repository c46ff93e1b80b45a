"""One answer of a chat as clients get it: what is said, and the calls of functions in it, whole or piece by piece.

This module knows no requests.
"""

from __future__ import annotations

import secrets

from tenon.serve.api.replies import (
    AnswerMessage,
    CalledFunction,
    ChatDelta,
    ChatFinish,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
)
from tenon.serve.text.said import Finish
from tenon.serve.text.tool_calls import CallBegins, CallScanner, Part


class Speech:
    """Text in, deltas out; `message` is all of it."""

    def __init__(self, scanner: CallScanner | None) -> None:
        """scanner: finds calls; None where none are looked for."""
        self._scanner = scanner
        self._text = ""
        self._calls: list[ToolCall] = []

    def push(self, text: str) -> list[ChatDelta]:
        """What is new."""
        return self._told([text] if text else []) if self._scanner is None else self._told(self._scanner.push(text))

    def finish(self) -> list[ChatDelta]:
        """What was held back: no text follows."""
        return [] if self._scanner is None else self._told(self._scanner.finish())

    @property
    def message(self) -> AnswerMessage:
        """All that was said and called."""
        content = None if self._calls and not self._text else self._text
        return AnswerMessage(content=content, tool_calls=self._calls or None)

    def reason(self, finish: Finish) -> ChatFinish:
        """Why it ended, as chats tell it."""
        return "tool_calls" if self._calls and finish == "stop" else finish

    def _told(self, parts: list[Part]) -> list[ChatDelta]:
        deltas = []
        for part in parts:
            if isinstance(part, str):
                self._text += part
                deltas.append(ChatDelta(content=part))
            elif isinstance(part, CallBegins):
                function = CalledFunction(name=part.name, arguments="")
                call = ToolCall(id=f"call_{secrets.token_hex(12)}", function=function)
                self._calls.append(call)
                begun = FunctionDelta(name=part.name, arguments="")
                deltas.append(_delta(ToolCallDelta(index=part.number, id=call.id, type="function", function=begun)))
            else:
                self._calls[part.number].function.arguments += part.text
                more = FunctionDelta(arguments=part.text)
                deltas.append(_delta(ToolCallDelta(index=part.number, function=more)))
        return deltas


def _delta(call: ToolCallDelta) -> ChatDelta:
    return ChatDelta(tool_calls=[call])
