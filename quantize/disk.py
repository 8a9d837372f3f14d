"""What is said when the disk does not take a file, wherever in a run that happens."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantize.errors import QuantizeError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFull(QuantizeError):
    """No room for a file, or a limit on its size; what was there before is still there."""

    def __init__(self, path: Path, reason: str) -> None:
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        free = shutil.disk_usage(folder).free
        super().__init__(
            f"could not write {path}: {reason} ({free / 1e6:.0f} MB free on that disk);"
            " make room and run the same command again, finished steps are kept; or choose another --out"
        )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn "no space" into DiskFull about the file that the error names, else about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise DiskFull(Path(error.filename or path), error.strerror or "the disk is full") from error
