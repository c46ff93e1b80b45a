"""A conversation with a resident base and any number of adapters: one long-lived worker, turns in, tokens out.

This module does not know screens, nor how names become subjects (service.subjects).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from tenon.plan.requests import ChatStart, ChatTurn, Engine, Message, Sampling, Subject
from tenon.processes import Event, start_worker, worker_log
from tenon.service.environment import require_training
from tenon.settings import Settings


class Conversation:
    """Talks to one worker. Close it at the end, or use it as a context manager."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        """Starts the worker; `open` waits until it is ready. Raises those of `require_training`."""
        require_training()
        self.engine = engine
        self._worker = start_worker("chat", None, settings=settings, log=worker_log("chat", settings))
        self._events = self._worker.events()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_ignored: object) -> None:
        self.close()

    def open(self, subjects: Sequence[Subject], on_event: Callable[[Event], None]) -> None:
        """Load the base and these adapters. on_event: told what happens meanwhile. Raises what the worker raises."""
        self._worker.send(ChatStart(engine=self.engine, subjects=tuple(subjects)))
        for event in self._events:
            if event["kind"] == "ready":
                return
            on_event(event)
        self._worker.finish()

    def say(self, subject: Subject, messages: Sequence[Message], sampling: Sampling) -> Iterator[Event]:
        """Have a conversation answered: `token` events, then one `answer`. Raises what the worker raises."""
        self._worker.send(ChatTurn(subject=subject, messages=tuple(messages), sampling=sampling))
        for event in self._events:
            yield event
            if event["kind"] == "answer":
                return
        self._worker.finish()

    def interrupt(self) -> None:
        """End the answer that is being written; its `answer` event still comes."""
        self._worker.interrupt()

    def close(self) -> None:
        """End the worker."""
        if self._worker.running:
            self._worker.close_input()
            self._worker.stop()
        for _ in self._events:
            pass
        if self._worker.error is None:
            self._worker.log.unlink(missing_ok=True)
