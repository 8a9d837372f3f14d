"""Bring an entry into the store so that it is either all there or not there at all.

A pull works in LQ_HOME/tmp/pulls/NAME under a lock of that name; what it fetched stays for a rerun; the last
act is one rename. Knows no source and no format.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from models.atomic import sync
from models.source import Progress


@dataclass(frozen=True, slots=True)
class Stage:
    """The working folder of one pull: `content` becomes the entry, `work` is for the source's own use."""

    folder: Path

    @property
    def content(self) -> Path:
        return self.folder / "content"

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def prepare(self, source: str) -> None:
        """Keep what an interrupted pull of the same source left; drop what another source left."""
        note = self.folder / "source"
        if self.folder.exists() and not (note.exists() and note.read_text("utf-8") == source):
            shutil.rmtree(self.folder)
        self.content.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(exist_ok=True)
        note.write_text(source, "utf-8")

    def pin(self, revision: str) -> None:
        """Keep what an interrupted pull left of this revision of the source; drop what is of another."""
        note = self.work / "revision"
        if not (note.exists() and note.read_text("utf-8") == revision):
            shutil.rmtree(self.content)
            self.content.mkdir()
        note.write_text(revision, "utf-8")

    def publish(self, target: Path) -> None:
        """Make the content durable and visible as `target` in one step, in place of what was there."""
        target.parent.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.content.rglob("*")):
            sync(path)
        sync(self.content)
        if target.exists():
            target.rename(self.folder / "replaced")
        self.content.rename(target)
        sync(target.parent)
        shutil.rmtree(self.folder)

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def locked(path: Path, *, what: str, progress: Progress) -> Iterator[None]:
    """Hold the lock file; says through `progress` when another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress(f"waiting for another process that works on {what}", 0, None)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
