"""Processes that do the data's work beside the trainer: plain children that talk through their own pipes.

A child lives as long as its standard input is open: when the parent ends, even by SIGKILL, the pipe closes and the
child leaves by itself. A child that is lost (out of memory, killed) costs nothing but time: its task is done again.
This module does not know what tasks do.
"""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import IO, Any, Generic, Protocol, TypeVar, cast

from tenon.errors import TenonError

Result = TypeVar("Result", covariant=True)
ENTRY = "tenon.data.worker"
LOST_AT_MOST = 3
CLOSE_SECONDS = 5.0
BACKGROUND_NICE = 10


class Task(Protocol[Result]):
    """A picklable piece of work. memo: what a worker keeps between tasks (a tokenizer, an open file)."""

    def run(self, memo: dict[Any, Any]) -> Result: ...


class WorkerLostError(Exception):
    """A worker process ended before it answered."""


class WorkerProcess:
    """One child. Not thread-safe: one thread talks to it."""

    def __init__(self, *, nice: int) -> None:
        # Without -P, a file in the current folder could stand in for a module of the library.
        command = [sys.executable, "-P", "-m", ENTRY, str(nice)]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._greeted = False

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._child.pid

    def call(self, task: Task[Result]) -> Result:
        """Do the task in the child. Raises what the task raised (TenonError), or WorkerLostError."""
        stdin, stdout = cast(IO[bytes], self._child.stdin), cast(IO[bytes], self._child.stdout)
        try:
            if not self._greeted:
                # The child imports what tasks need from where this process does.
                pickle.dump(sys.path, stdin)
                self._greeted = True
            pickle.dump(task, stdin, protocol=pickle.HIGHEST_PROTOCOL)
            stdin.flush()
            done, value = pickle.load(stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise WorkerLostError(f"worker {self.pid} is gone") from error
        if not done:
            raise value
        return value

    def stop(self) -> None:
        """End the child now, whatever it does: all that tasks write is atomic."""
        self._child.kill()

    def close(self) -> None:
        """Let the child leave and collect it."""
        stdin, stdout = cast(IO[bytes], self._child.stdin), cast(IO[bytes], self._child.stdout)
        with contextlib.suppress(BrokenPipeError):
            stdin.close()
        try:
            self._child.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        stdout.close()


class WorkerPool(Generic[Result]):
    """Does a list of tasks in `workers` processes, in order of the list, each result handed over as it comes.

    on_result is called with (index of the task, its result) from the pool's threads, one at a time; what it raises
    (TenonError, OSError) stops the pool. With no workers, all is done in `join`.
    """

    def __init__(
        self,
        tasks: Sequence[Task[Result]],
        *,
        workers: int,
        nice: int,
        on_result: Callable[[int, Result], None],
    ) -> None:
        self._tasks = tasks
        self._waiting = list(reversed(range(len(tasks))))
        self._nice = nice
        self._on_result = on_result
        self._lock = threading.Lock()
        self._processes: list[WorkerProcess] = []
        self._stopping = False
        self._error: Exception | None = None
        count = min(workers, len(tasks))
        self._threads = [threading.Thread(target=self._serve, name=f"data-{n}", daemon=True) for n in range(count)]

    @property
    def error(self) -> Exception | None:
        """The first error of a task, if any: the pool has stopped then."""
        return self._error

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the children started so far."""
        return tuple(process.pid for process in self._processes)

    def start(self) -> None:
        """Begin in the background."""
        for thread in self._threads:
            thread.start()

    def join(self, memo: dict[Any, Any] | None = None) -> None:
        """Wait until all is done; what lost workers left is done here. Raises the first error of a task.

        memo: handed to tasks that are done here.
        """
        for thread in self._threads:
            thread.join()
        memo = {} if memo is None else memo
        while self._error is None and not self._stopping and self._waiting:
            index = self._waiting.pop()
            self._on_result(index, self._tasks[index].run(memo))
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Stop at once and leave no process behind."""
        with self._lock:
            self._stopping = True
            processes = list(self._processes)
        for process in processes:
            process.stop()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _serve(self) -> None:
        for _ in range(LOST_AT_MOST):
            process = self._start_process()
            if process is None:
                return
            try:
                self._feed(process)
                return
            except WorkerLostError:
                continue
            except (TenonError, OSError) as error:
                self._fail(error)
                return
            finally:
                process.close()

    def _start_process(self) -> WorkerProcess | None:
        with self._lock:
            if self._stopping or not self._waiting:
                return None
            process = WorkerProcess(nice=self._nice)
            self._processes.append(process)
            return process

    def _feed(self, process: WorkerProcess) -> None:
        while True:
            with self._lock:
                if self._stopping or self._error is not None or not self._waiting:
                    return
                index = self._waiting.pop()
            try:
                result = process.call(self._tasks[index])
            except WorkerLostError:
                with self._lock:
                    self._waiting.append(index)
                raise
            with self._lock:
                self._on_result(index, result)

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self._error = self._error or error


def run_tasks(
    tasks: Sequence[Task[Result]], *, workers: int, nice: int = 0, on_done: Callable[[int], None] | None = None
) -> list[Result]:
    """Do all tasks and return their results in order; in this process when `workers` is below 2.

    on_done: called with the number of tasks done so far.
    """
    results: dict[int, Result] = {}

    def keep(index: int, result: Result) -> None:
        results[index] = result
        if on_done is not None:
            on_done(len(results))

    if workers < 2 or len(tasks) < 2:
        memo: dict[Any, Any] = {}
        for index, task in enumerate(tasks):
            keep(index, task.run(memo))
    else:
        pool = WorkerPool(tasks, workers=workers, nice=nice, on_result=keep)
        pool.start()
        try:
            pool.join()
        finally:
            pool.close()
    return [results[index] for index in range(len(tasks))]
