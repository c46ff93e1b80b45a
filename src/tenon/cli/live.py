"""The live view of running work: a progress bar that redraws itself in a terminal, plain lines now and then elsewhere.

Both go to standard error. This module does not know where events come from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from tenon.cli.gpu_view import gpu_busy, gpu_text
from tenon.cli.progress_state import Event, SlotState, WorkState, sparkline
from tenon.units import format_bytes, format_rate, format_seconds

PLAIN_EVERY_SECONDS = 10.0

# What the phases of the pipeline are called on screen; others are shown by their own name.
_PHASES = {
    "starting": "starting the worker",
    "disk": "measuring the disk",
    "network": "trying the network",
    "kernels": "trying out kernels",
    "plan": "planning",
    "data": "reading the data",
    "base": "loading the base",
    "check": "checking the fast paths",
    "train": "training",
    "evaluate": "evaluating",
    "register": "registering",
}


class View(Protocol):
    """Shows events while work runs."""

    state: WorkState

    def __enter__(self) -> View: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def take(self, event: Event) -> None:
        """Show one event."""
        ...

    def say(self, text: str) -> None:
        """Show a line that stays."""
        ...


def make_view(console: Console, *, quiet: bool = False) -> View:
    """The view for this console: live in a terminal, plain lines elsewhere, only warnings when quiet."""
    if quiet:
        return PlainView(console, every_seconds=math.inf)
    return LiveView(console) if console.is_terminal else PlainView(console)


class PlainView:
    """A line at each change of phase, at each validation, and every few seconds in between."""

    def __init__(
        self,
        console: Console,
        *,
        every_seconds: float = PLAIN_EVERY_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.state = WorkState()
        self._console = console
        self._every_seconds = every_seconds
        self._clock = clock
        self._last = -math.inf
        self._phase = ""
        self._said = ""

    def __enter__(self) -> PlainView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.state.phase == "train":
            self._say_state()

    def take(self, event: Event) -> None:
        """Show one event, if it is worth a line or time for one."""
        if event["kind"] == "gpu":  # comes between two steps: no news of its own
            self.state.take(event)
            return
        if event["kind"] == "phase" and self.state.phase == "train":
            self._say_state()
        self.state.take(event)
        quiet = math.isinf(self._every_seconds)
        for note in self.state.notes:
            if not quiet or note.startswith("warning"):
                self.say(note)
        self.state.notes.clear()
        if quiet:
            return
        now, phase = self._clock(), self.state.phase
        if phase != self._phase or now - self._last >= self._every_seconds:
            self._phase, self._last = phase, now
            self._say_state()

    def _say_state(self) -> None:
        line = plain_line(self.state)
        if self._every_seconds < math.inf and line != self._said:
            self._said = line
            self.say(line)

    def say(self, text: str) -> None:
        """One line."""
        self._console.print(Text(text), soft_wrap=True)


class LiveView:
    """A block of lines that redraws itself; notes scroll past above it."""

    def __init__(self, console: Console) -> None:
        self.state = WorkState()
        self._console = console
        self._spinner = Spinner("dots")
        self._started = time.monotonic()
        self._live = Live(console=console, refresh_per_second=8, transient=True, get_renderable=self._render)

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        if self.state.slots:
            for slot in self.state.slots.values():
                self._console.print(_last_line(slot, self.state))

    def take(self, event: Event) -> None:
        """Show one event; the screen follows by itself."""
        self.state.take(event)
        for note in self.state.notes:
            self.say(note)
        self.state.notes.clear()

    def say(self, text: str) -> None:
        """One line above the block."""
        style = "yellow" if text.startswith("warning") else ""
        self._live.console.print(Text(text, style=style))

    def _render(self) -> RenderableType:
        state = self.state
        elapsed = format_seconds(math.floor(time.monotonic() - self._started))
        head = Table.grid(padding=(0, 1))
        head.add_row(self._spinner, Text(_PHASES.get(state.phase, state.phase), "bold"), Text(state.detail, "dim"))
        parts: list[RenderableType] = [head]
        if state.phase == "train":
            parts.append(_slots_table(state))
            parts.append(Text.assemble(("  ", ""), (_facts_line(state, elapsed), "dim")))
            if gpu := gpu_text(state.gpus.values()):
                parts.append(Text(f"  {gpu}", "dim"))
        elif state.total or state.what:
            parts.append(_progress_row(state, elapsed))
        return Group(*parts)


def plain_line(state: WorkState) -> str:
    """The state in one line without colours: for logs."""
    name = _PHASES.get(state.phase, state.phase)
    if state.phase != "train" or not state.slots:
        count = f" {state.done:,}/{state.total:,}" if state.total else ""
        detail = " ".join(part for part in (state.detail, state.what) if part)
        return f"{name}{': ' + detail if detail else ''}{count}"
    slots = state.slots.values()
    figures = "; ".join(
        f"{slot.name + ' ' if len(slots) > 1 else ''}step {slot.step}/{slot.total_steps}"
        f" ({slot.progress:.0%}) loss {slot.loss:.4f} lr {slot.lr:.2e}"
        for slot in slots
    )
    return f"{figures}; {_facts_line(state, '')}"


def _slots_table(state: WorkState) -> Table:
    table = Table.grid(padding=(0, 1))
    many = len(state.slots) > 1
    for slot in state.slots.values():
        table.add_row(
            Text(f"  {slot.name}" if many else " ", "cyan"),
            ProgressBar(total=1.0, completed=slot.progress, width=28),
            Text(f"{slot.progress:4.0%}"),
            Text(f"step {slot.step:,}/{slot.total_steps:,}"),
            Text(f"loss {slot.loss:.4f}", "bold"),
            Text(sparkline(slot.losses, 16), "green"),
            Text(f"lr {slot.lr:.2e}", "dim"),
        )
    return table


def _progress_row(state: WorkState, elapsed: str) -> Table:
    table = Table.grid(padding=(0, 1))
    count = f"{state.done:,}/{state.total:,}" if state.total else f"{state.done:,}" if state.done else ""
    bar = ProgressBar(total=state.total or None, completed=state.done, width=28, pulse=not state.total)
    table.add_row(" ", bar, Text(count), Text(state.what), Text(elapsed, "dim"))
    return table


def _facts_line(state: WorkState, elapsed: str) -> str:
    facts = [
        format_rate(state.tokens_per_second, "tokens") if math.isfinite(state.tokens_per_second) else "",
        f"{format_seconds(math.ceil(state.seconds_left))} left" if math.isfinite(state.seconds_left) else "",
        f"{format_bytes(state.memory_bytes)} memory" if state.memory_bytes else "",
        "" if elapsed else gpu_busy(state.gpus.values()),
        elapsed,
    ]
    return ", ".join(fact for fact in facts if fact)


def _last_line(slot: SlotState, state: WorkState) -> Text:
    name = f"{slot.name}: " if len(state.slots) > 1 else ""
    return Text.assemble(
        f"{name}step {slot.step:,}/{slot.total_steps:,}, loss {slot.loss:.4f} ",
        (sparkline(slot.losses, 24), "green"),
    )
