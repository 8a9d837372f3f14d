"""Build a collection anew beside the old one, which answers until the new one takes its place whole.

Owns the scratch database; knows nothing of files and embedders. What was embedded outlives an interruption.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rag.broken import BrokenCollection
from rag.settings import Settings
from rag.store import Database

_SCRATCH = "rebuild.sqlite"


@contextmanager
def scratch(old: Database, settings: Settings, roots: Sequence[str]) -> Iterator[Database]:
    """An empty database with the old one's vectors, where the embedder is the same."""
    path = old.path.with_name(_SCRATCH)
    try:
        database = Database(path, create=True)
    except BrokenCollection:  # left by a run that was cut off; only vectors can be lost
        discard(path.parent)
        database = Database(path, create=True)
    try:
        database.start(settings, roots)
        before = old.settings()
        same = before is not None and before.embedder_fingerprint == settings.embedder_fingerprint
        database.succeed(old.path, with_vectors=same)
        yield database
    finally:
        database.close()


def discard(directory: Path) -> None:
    """Delete the scratch database of a collection, if there is one."""
    for path in directory.glob(f"{_SCRATCH}*"):
        path.unlink(missing_ok=True)
