"""Write a file so that it appears whole or not at all: beside its place, flushed to the disk, then renamed.

Knows nothing of what is written.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Matches, in their folder, what processes left that were killed while they wrote.
LEFT_BEHIND = ".*.lq-*.partial"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it becomes `path` at the end, and is removed on any failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(partial_name(path.name))
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def partial_name(name: str) -> str:
    """Hidden, ours, and this process's own, so that two that write the same file do no harm."""
    return f".{name}.lq-{os.getpid()}.partial"


def sync(path: Path) -> None:
    """fsync a file or folder; folders cannot be synced on Windows and need not be."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
