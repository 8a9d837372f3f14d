"""What every source of models speaks: progress, what was fetched, the errors that all share.

Knows no particular source.
"""

import errno
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from models.errors import ModelsError

#: Called with (what, done_bytes, total_bytes or None when unknown), often.
Progress = Callable[[str, int, int | None], None]

#: File names that can run code when opened; never fetched, whatever they hold.
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz"})


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a source put into the folder it was given."""

    source: str
    revision: str | None = None
    licence: str | None = None


class FetchFailed(ModelsError):
    """A source could not deliver; one line with the reason and what to do."""


class DiskFull(ModelsError):
    """No space left; what was fetched so far is kept for a rerun. `variable` moves the folder elsewhere."""

    def __init__(
        self,
        folder: Path,
        *,
        needed_bytes: int | None = None,
        free_bytes: int | None = None,
        variable: str = "LQ_HOME",
    ) -> None:
        sizes = ""
        if needed_bytes is not None and free_bytes is not None:
            sizes = f" ({needed_bytes / 1e6:.0f} MB needed, {free_bytes / 1e6:.0f} MB free)"
        super().__init__(
            f"the disk that holds {folder} is full{sizes}; free some space and run the same command again, "
            f"it goes on where it stopped; or set {variable} to a folder on a larger disk"
        )


@contextmanager
def disk_errors(folder: Path, *, variable: str = "LQ_HOME") -> Iterator[None]:
    """Turn "no space" and "over quota" into DiskFull."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(folder, variable=variable) from error
        raise


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def silent(_what: str, _done_bytes: int, _total_bytes: int | None) -> None:
    """The progress callback of a caller that wants none."""
