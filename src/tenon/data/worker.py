"""The child side of `workers.py`: takes pickled tasks from standard input, answers on standard output.

It leaves when standard input ends. This module does not know what tasks do; unpickling a task imports what it needs.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from typing import Any

from tenon.errors import TenonError


def main() -> None:
    """Serve until standard input ends."""
    # Ctrl-C reaches the whole terminal group; the parent decides what it means for us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(int(sys.argv[1]))
    # Answers have the real standard output for themselves: whatever a library prints goes to standard error.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    memo: dict[Any, Any] = {}
    while True:
        try:
            task = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        if isinstance(task, list):
            # The first word: where the parent imports from.
            sys.path[:] = task
            continue
        try:
            answer: tuple[bool, Any] = (True, task.run(memo))
        except (TenonError, OSError) as error:
            answer = (False, error)
        try:
            pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()
        except BrokenPipeError:
            return


if __name__ == "__main__":
    main()
