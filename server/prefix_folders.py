"""Whose folders of saved prefixes are there: those of models that a live server may load, and no others.

The folders lie side by side, one for all that decides what a saved state is (server/engines.py). A server
holds a shared lock on the folder of each of its models, loaded or not. What no server has locked belongs to a
model that was replaced or is configured no more: no budget counts it, so it is deleted at the next start. A
folder's name is MODEL-PLACING: how a model is placed may change with the memory that is free at a start, and
change back, so what it had elsewhere stays for a while.
"""

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

SPARED_S = 30 * 86400.0  # since anything was written to it: a folder of a model that is placed otherwise now

LOG = logging.getLogger("lq.server")


class Claims:
    """Locks on folders, held until `close`. Without any folder nothing is locked and nothing deleted."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._locks = ExitStack()
        mine = set(folders)
        for parent in {folder.parent for folder in mine}:
            parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with ExitStack() as at_a_time:  # no two servers claim and sweep at once
                _lock(parent, fcntl.LOCK_EX, at_a_time)
                for folder in sorted(mine):
                    folder.mkdir(mode=0o700, exist_ok=True)
                    _lock(folder, fcntl.LOCK_SH, self._locks)
                _sweep(parent, mine)

    def close(self) -> None:
        """Another server may delete what no other one has claimed."""
        self._locks.close()


def _sweep(parent: Path, mine: set[Path]) -> None:
    """Delete the folders that nobody has claimed."""
    for folder in parent.iterdir():
        if folder in mine or folder.is_symlink() or not folder.is_dir():
            continue
        try:
            _delete(folder, unless_of={each.name.split("-")[0] for each in mine})
        except BlockingIOError:  # of a live server
            continue
        except OSError as error:
            LOG.warning("saved prefixes that no configured model can use cannot be deleted: %s", error)


def _delete(folder: Path, *, unless_of: set[str]) -> None:
    """Delete a folder if nobody locks it, and unless it is of one of these models and not old."""
    with ExitStack() as lock:
        _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB, lock)
        if folder.name.split("-")[0] in unless_of and time.time() - folder.stat().st_mtime < SPARED_S:
            return
        size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        shutil.rmtree(folder)
        megabytes = f"{size_bytes / 1e6:,.1f} MB"
        LOG.info("deleted %s of saved prefixes that no configured model can use: %s", megabytes, folder)


def _lock(folder: Path, how: int, until: ExitStack) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    until.callback(os.close, descriptor)
    fcntl.flock(descriptor, how)
