"""Every error that a user can cause: what happened, what was got, what to type next.

The tree (the code of an error is also its exit status group and its anchor in docs/errors.md):

    TenonError
    ├── RecipeError       recipe-…    the recipe asks for something that does not exist or does not apply
    ├── PlanError         plan-…      what was asked cannot run here (memory, device, versions)
    ├── BaseModelError    base-…      the base is missing, damaged, or of an unknown architecture
    ├── DataError         data-…      a source, a row or a split is unusable
    ├── AdapterError      adapter-…   an adapter file or a registry entry is not what it claims
    ├── RunError          run-…       a run folder is missing, damaged, busy or out of space
    ├── TrainError        train-…     training itself failed (non-finite loss, …)
    └── UsageError        usage-…     the command line, or the machine it is typed on

This module does not know how errors are shown (cli) nor who raises them.
"""

from __future__ import annotations

# Exit statuses: documented in docs/errors.md. 75 is EX_TEMPFAIL of sysexits.h: "try again", here "resume me".
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_RESUME = 75


class TenonError(Exception):
    """An error with a code, the fact, what was got, and the next thing to type.

    code: stable, lower-case, hyphenated; an anchor in docs/errors.md.
    what: one sentence: what happened, naming the file, row, module or key.
    got: the offending value, shortened; empty when the sentence says it already.
    hint: what to type or change next; always present.
    """

    exit_status = EXIT_ERROR

    def __init__(self, code: str, what: str, *, got: str = "", hint: str) -> None:
        self.code = code
        self.what = what
        self.got = got
        self.hint = hint
        super().__init__(f"{code}: {what}" + (f" (got {got})" if got else "") + f" — {hint}")

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process boundaries (tokenising workers); keyword-only arguments need help to unpickle.
        return _rebuild, (type(self), self.code, self.what, self.got, self.hint)


def _rebuild(kind: type[TenonError], code: str, what: str, got: str, hint: str) -> TenonError:
    return kind(code, what, got=got, hint=hint)


class RecipeError(TenonError):
    """The recipe asks for something that does not exist or does not apply."""

    exit_status = EXIT_USAGE


class PlanError(TenonError):
    """What was asked cannot run on this machine."""


class BaseModelError(TenonError):
    """The base is missing, damaged, or of an architecture that Tenon does not know."""


class DataError(TenonError):
    """A source, a row or a split cannot be used."""


class AdapterError(TenonError):
    """An adapter file or a registry entry is not what it claims to be."""


class AccessError(TenonError):
    """A key is unknown, may not do what was asked, or has used what it may use."""


class RunError(TenonError):
    """A run folder is missing, damaged, busy or out of space."""


class TrainError(TenonError):
    """Training failed in itself: a non-finite loss, a gradient that vanished."""


class UsageError(TenonError):
    """The command line, or the machine it is typed on, is at fault."""

    exit_status = EXIT_USAGE


class StopRequestedError(TenonError):
    """The run was asked to stop (SIGTERM, Ctrl-C) and has saved what it had: resume it."""

    exit_status = EXIT_RESUME


_KINDS: dict[str, type[TenonError]] = {
    "recipe": RecipeError,
    "plan": PlanError,
    "base": BaseModelError,
    "data": DataError,
    "access": AccessError,
    "adapter": AdapterError,
    "run": RunError,
    "train": TrainError,
    "usage": UsageError,
}


def error_of(code: str, what: str, *, got: str = "", hint: str) -> TenonError:
    """The error that another process told of, of the class that its code belongs to."""
    kind = _KINDS.get(code.partition("-")[0], TenonError)
    if code.endswith("-stopped"):
        kind = StopRequestedError
    return kind(code, what, got=got, hint=hint)
