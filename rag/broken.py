"""A collection's database that cannot be used, with what to do about it."""

import shutil
from pathlib import Path

from rag.errors import RagError


class BrokenCollection(RagError):
    def __init__(self, path: Path, reason: object) -> None:
        super().__init__(
            f"{path} cannot be used: {reason}; free space or mend the disk, or delete the folder "
            f"{path.parent} and index again"
        )


class UnfinishedCollection(BrokenCollection):
    """A database without tables: its creation was interrupted, nothing was indexed."""


class FullDisk(RagError):
    def __init__(self, path: Path, reason: object) -> None:
        super().__init__(
            f"collection {path.parent.name!r}: {reason} ({path}, {_free(path.parent)} bytes free); "
            "free space and run the command again, nothing is lost"
        )


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "unknown"
