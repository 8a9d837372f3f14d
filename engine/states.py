"""The bytes of saved states: in host memory, and in one file each on disk, where they outlive the process.

stash.py decides which stay. A file is written whole or not at all, carries a checksum, and is only read by an
engine of the same model, cache types and library; it holds no names, but the tokens of prompts: the folder is
for the owner's eyes only.

Files are read and written between two calls. 35 MB (1,500 tokens of a small model) take 23 ms to read and
54 ms to write, 12 ms of each for the checksum, where the page cache has room: a stall of 250 ms is reached at
about 160 MB. A cryptographic digest would take 57 ms more (BLAKE2b), to guard against what nobody who can
write the folder needs.
"""

import contextlib
import hashlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from engine.stash import State

SUFFIX = ".state"
MAGIC = b"lqstate2"


class Header(msgspec.Struct, frozen=True):
    """What is in front of a file's bytes."""

    fingerprint: str
    namespace: str
    tokens: bytes  # int32
    size_bytes: int
    checksum: int  # CRC-32 of the bytes


class States:
    """State -> bytes. Without a folder nothing is kept on disk."""

    def __init__(self, folder: Path | None = None, *, fingerprint: str = "") -> None:
        self._folder = folder
        self._fingerprint = fingerprint
        self._bytes: dict[State, np.ndarray] = {}
        self._files: dict[State, Path] = {}
        if folder is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def keep(self, state: State, data: np.ndarray) -> None:
        """Hold a state's bytes in memory."""
        self._bytes[state] = data

    def read(self, state: State) -> np.ndarray | None:
        """A state's bytes; None when its file is damaged or gone."""
        if state in self._bytes:
            return self._bytes[state]
        path = self._files.get(state)
        if path is None:
            return None
        try:
            header, data = _read(path)
        except (OSError, ValueError, msgspec.DecodeError):
            return None
        return data if zlib.crc32(data.data) == header.checksum else None

    def copy(self, state: State) -> None:
        """Have a state's bytes on disk, too, if they can be written: else it is tried again in `demote`."""
        data = self._bytes.get(state)
        if data is not None and self._folder is not None and state not in self._files:
            with contextlib.suppress(OSError):  # a full disk costs the cache, not the request
                self._files[state] = self._write(self._folder, state, data)

    def demote(self, state: State) -> bool:
        """Move a state's bytes to disk, where they may be already; False when they are lost."""
        self.copy(state)
        self._bytes.pop(state, None)
        return state in self._files

    def discard(self, state: State) -> None:
        """Throw a state's bytes away."""
        self._bytes.pop(state, None)
        path = self._files.pop(state, None)
        if path is not None and path not in self._files.values():  # two of the same tokens have one file
            with contextlib.suppress(OSError):
                path.unlink()

    def found(self) -> Iterator[State]:
        """What an earlier process left for this fingerprint; what nobody can ever use again is deleted.

        That is what half a write left, what is damaged, and what has another fingerprint: the
        model, an adapter or the library was replaced.
        """
        if self._folder is None:
            return
        for path in self._folder.glob("*.part"):
            path.unlink(missing_ok=True)
        for path in sorted(self._folder.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime):
            try:
                header, _ = _read(path, head_only=True)
            except (OSError, ValueError, msgspec.DecodeError):
                path.unlink(missing_ok=True)
                continue
            if header.fingerprint != self._fingerprint:
                path.unlink(missing_ok=True)
                continue
            tokens = np.frombuffer(header.tokens, np.int32).tolist()
            state = State(tokens, header.namespace, header.size_bytes, tier="disk")
            self._files[state] = path
            yield state

    def _write(self, folder: Path, state: State, data: np.ndarray) -> Path:
        tokens = np.asarray(state.tokens, np.int32).tobytes()
        header = Header(self._fingerprint, str(state.namespace), tokens, len(data), zlib.crc32(data.data))
        head = msgspec.msgpack.encode(header)
        name = hashlib.blake2b(
            repr((self._fingerprint, state.namespace)).encode() + tokens, digest_size=16
        ).hexdigest()
        path = folder / f"{name}{SUFFIX}"
        part = path.with_suffix(".part")
        try:
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(MAGIC + len(head).to_bytes(4, "little") + head)
                file.write(data.data)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return path


def _read(path: Path, *, head_only: bool = False) -> tuple[Header, np.ndarray]:
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{path}: no saved state")
        size = int.from_bytes(file.read(4), "little")
        header = msgspec.msgpack.decode(file.read(min(size, 1 << 26)), type=Header)
        n_bytes = os.fstat(file.fileno()).st_size - file.tell()
        if n_bytes != header.size_bytes:
            raise ValueError(f"{path}: {n_bytes} bytes instead of {header.size_bytes}")
        data = np.empty(0, np.uint8) if head_only else np.fromfile(file, np.uint8)
    return header, data
