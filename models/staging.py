"""Bring an entry into the store so that it is either all there or not there at all.

A pull works in LQ_HOME/tmp/pulls/NAME under a lock of that name; what it fetched stays for a rerun; the last
act is one rename. Knows no source and no format.
"""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from models.atomic import LEFT_BEHIND, sync
from models.manifest import FILE_NAME
from models.source import Progress


@dataclass(frozen=True, slots=True)
class Stage:
    """The working folder of one pull: `content` becomes the entry, `work` is for the source's own use."""

    folder: Path

    @property
    def content(self) -> Path:
        """What becomes the entry."""
        return self.folder / "content"

    @property
    def work(self) -> Path:
        """What the source keeps for a rerun and nobody else sees."""
        return self.folder / "work"

    @property
    def _replaced(self) -> Path:
        return self.folder / "replaced"

    def restore(self, target: Path) -> None:
        """Put back the entry that a process was killed while replacing."""
        if self._replaced.is_dir() and not target.exists():
            self._replaced.rename(target)

    def prepare(self, source: str) -> None:
        """Keep the whole files that an interrupted pull of the same source left; drop all else."""
        note = self.folder / "source"
        if self.folder.exists() and not (note.exists() and note.read_text("utf-8") == source):
            shutil.rmtree(self.folder)
        self.content.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(exist_ok=True)
        for path in (self.content / FILE_NAME, *self.folder.rglob(LEFT_BEHIND)):
            path.unlink(missing_ok=True)  # by a process that was killed; the manifest was of that run
        note.write_text(source, "utf-8")

    def keep(self, names: Iterable[str]) -> None:
        """Drop files of the content that are not among `names`, which the source no longer has."""
        kept = {self.content / name for name in names}
        for path in [path for path in self.content.rglob("*") if path.is_file()]:
            if path not in kept:
                path.unlink()

    @property
    def is_empty(self) -> bool:
        """Whether nothing was fetched yet."""
        return not any(path.is_file() for path in self.content.rglob("*"))

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
            target.rename(self._replaced)
        self.content.rename(target)
        sync(target.parent)
        shutil.rmtree(self.folder)

    def discard(self) -> None:
        """Forget it all."""
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
