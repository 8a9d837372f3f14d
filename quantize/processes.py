"""Work on tasks in processes of their own, side by side; one that dies or fails leaves none behind.

Owns their lives and what they say. Knows nothing of what the work is.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TypeVar

from quantize.errors import QuantizeError

Task = TypeVar("Task")

# What a connection raises when the process at its other end has ended: the second where it left
# something unread.
GONE = (EOFError, ConnectionError)


class WorkFailed(QuantizeError):
    """What a process said was wrong, as the work there raised it."""


class WorkerDied(QuantizeError):
    """A process that ended without a word."""

    def __init__(self, name: str, exitcode: int | None) -> None:
        killed = exitcode == -signal.SIGKILL
        why = "killed, most likely for want of memory" if killed else f"exit code {exitcode}"
        super().__init__(
            f"a process that was {name} died ({why}); free memory or lower --threads, and run the same "
            "command again: what is finished is kept"
        )


def side_by_side(
    work: Callable[[Task], object],
    tasks: Sequence[Task],
    *,
    n_processes: int,
    name: str,
    set_up: Callable[[], object] | None = None,
) -> Iterator[Task]:
    """Call `work` on each task in processes that are there for these tasks alone, as `Processes` does."""
    with Processes(work, n_processes, name, set_up) as processes:
        yield from processes.each(tasks)


class Processes:
    """At most `n_processes` that call `work` on one task after another; started when they are first needed.

    `work`, tasks and `set_up`, which each process calls first, are sent, so they must be importable. `name`
    says what is being done. Used with `with`: the processes are gone when it ends, however it ends.
    """

    def __init__(
        self,
        work: Callable,
        n_processes: int,
        name: str,
        set_up: Callable[[], object] | None = None,
    ) -> None:
        self.work, self.n_processes, self.name, self.set_up = work, n_processes, name, set_up
        self._crew: list[tuple[BaseProcess, Connection]] = []

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for process, connection in self._crew:
            process.kill()
            process.join()
            connection.close()
        self._crew.clear()

    def each(self, tasks: Sequence[Task]) -> Iterator[Task]:
        """Do all of them, each in the next process that is free; yields tasks as they are finished.

        Raises WorkFailed with a QuantizeError's words, and WorkerDied; what is not finished then never is.
        """
        waiting = iter(tasks)
        while len(self._crew) < min(self.n_processes, len(tasks)):
            self._crew.append(_start(self.work, self.set_up))
        busy: dict[Connection, tuple[BaseProcess, Task]] = {}
        for (process, connection), task in zip(self._crew, waiting, strict=False):
            self._tell(process, connection, task)
            busy[connection] = process, task
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                process, task = busy.pop(ready)
                self._heed(process, ready)
                for following in waiting:
                    self._tell(process, ready, following)
                    busy[ready] = process, following
                    break
                yield task

    def _tell(self, process: BaseProcess, connection: Connection, task: object) -> None:
        with self._alive(process):
            connection.send(task)

    def _heed(self, process: BaseProcess, connection: Connection) -> None:
        """Raise what a process says was wrong."""
        with self._alive(process):
            failure = connection.recv()
        if failure is not None:
            raise WorkFailed(failure)

    @contextmanager
    def _alive(self, process: BaseProcess) -> Iterator[None]:
        """Raise WorkerDied where the other end of a connection is gone."""
        try:
            yield
        except GONE:
            process.join()
            raise WorkerDied(self.name, process.exitcode) from None


def _start(work: Callable, set_up: Callable[[], object] | None) -> tuple[BaseProcess, Connection]:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(theirs, work, set_up), daemon=True)
    with deaf():
        process.start()
    theirs.close()  # so that its death is heard
    return process, ours


def _serve(connection: Connection, work: Callable, set_up: Callable[[], object] | None) -> None:
    """A process's whole life: Ctrl-C is the parent's to handle; a dead parent ends it at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_the_parent()
    if set_up is not None:
        set_up()
    while True:
        try:
            task = connection.recv()
        except GONE:
            return
        failure = None
        try:
            work(task)
        except QuantizeError as error:
            failure = str(error)
        try:
            connection.send(failure)
        except GONE:
            return


def end_with_the_parent() -> None:
    """End this process when its parent ends, however that does: the next run of a command that was killed
    must have its memory and its folders to itself."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_for_it() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_for_it, daemon=True).start()


@contextmanager
def deaf() -> Iterator[None]:
    """Ignore Ctrl-C, so that a process started meanwhile is born ignoring it; it is ours to handle."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say so; the child ignores it a moment later
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
