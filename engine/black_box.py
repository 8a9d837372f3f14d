"""What the engine's process was busy with, in memory that outlives it: read when it has died.

A crash in native code names nobody, and a message would cost every call one. Here the process notes the ids
of what it is about to work on, and the client, which holds the same page, reads the last note.
"""

import mmap
import os
import struct
import tempfile
from collections.abc import Iterable

from engine.request import MAX_SEQUENCES

_HEAD = struct.Struct("<QQ")  # notes so far; ids in the last one
SIZE = _HEAD.size + 8 * MAX_SEQUENCES


class BlackBox:
    """One page in both processes; made by `make`, opened in the other process by its file descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, SIZE)

    def note(self, ids: Iterable[int]) -> None:
        """From now on this process works on these; on none, when there are none."""
        chosen = list(ids)[:MAX_SEQUENCES]
        n_notes, _ = _HEAD.unpack_from(self._memory)
        _HEAD.pack_into(self._memory, 0, n_notes + 1, 0)  # a death in the middle of a note accuses nobody
        struct.pack_into(f"<{len(chosen)}Q", self._memory, _HEAD.size, *chosen)
        _HEAD.pack_into(self._memory, 0, n_notes + 1, len(chosen))

    def tick(self) -> None:
        """This process gets on with what it was working on."""
        n_notes, n_ids = _HEAD.unpack_from(self._memory)
        _HEAD.pack_into(self._memory, 0, n_notes + 1, n_ids)

    @property
    def ids(self) -> frozenset[int]:
        """What the last note says."""
        _, count = _HEAD.unpack_from(self._memory)
        return frozenset(struct.unpack_from(f"<{count}Q", self._memory, _HEAD.size))

    @property
    def n_notes(self) -> int:
        """Grows while the process gets on."""
        return _HEAD.unpack_from(self._memory)[0]

    def close(self) -> None:
        self._memory.close()


def make() -> int:
    """The descriptor of an empty one, to be closed by the caller."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("lq-black-box")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.truncate(descriptor, SIZE)
    return descriptor
