"""Progress of long work on the terminal: bars on stderr, and nothing at all when it is not a terminal."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from models.store import Progress


@contextmanager
def transfer_progress() -> Iterator[Progress]:
    """A bar on stderr for transfers, drawn on a terminal only."""
    if not sys.stderr.isatty():
        yield lambda _what, _done_bytes, _total_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bars(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bars:
        task, shown = bars.add_task("", total=None), ""

        def report(what: str, done_bytes: int, total_bytes: int | None) -> None:
            nonlocal shown
            if what != shown:
                bars.reset(task, description=what, total=total_bytes)
                shown = what
            bars.update(task, completed=done_bytes, total=total_bytes)

        yield report


@contextmanager
def task_progress() -> Iterator[Progress]:
    """A bar for what is being done, on stderr, where that is a terminal; else one line a task."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("starting", total=None)
        current = ""

        def show(what: str, done: int, total: int | None) -> None:
            nonlocal current
            heading = what.partition(":")[0]
            if heading != current:
                current = heading
                bars.reset(task, total=total, description=what)
            bars.update(task, description=what[:60], completed=done, total=total)

        yield show


class _Lines:
    """Progress where no one watches: each task is named once on stderr."""

    def __init__(self) -> None:
        self.current = ""

    def __call__(self, what: str, _done: int, _total: int | None) -> None:
        heading = what.partition(":")[0]
        if heading != self.current:
            self.current = heading
            print(heading, file=sys.stderr, flush=True)
