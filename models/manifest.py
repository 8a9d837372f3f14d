"""The manifest.json beside every stored model: what it is, where it came from, the hash of each file.

Knows its own format; where entries lie is models/store.py's business.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import msgspec

from models.errors import ModelsError

Kind = Literal["gguf", "checkpoint", "embedder", "adapter"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FILE_NAME = "manifest.json"


class BrokenManifest(ModelsError):
    """A manifest that cannot be read."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}; remove it with `lq rm {path.parent.name}` and pull it again")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file: path inside the entry with forward slashes, bytes, SHA-256 in hex."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What the store knows of an entry; `added_at` is UTC in ISO 8601."""

    name: str
    kind: Kind
    source: str
    revision: str | None
    licence: str | None
    files: tuple[FileRecord, ...]
    added_at: str

    @property
    def size_bytes(self) -> int:
        """All files together."""
        return sum(file.size_bytes for file in self.files)


def read(folder: Path) -> Manifest:
    """The manifest of an entry's folder."""
    path = folder / FILE_NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError:
        raise BrokenManifest(path, "missing") from None
    except msgspec.MsgspecError as error:
        raise BrokenManifest(path, f"not readable: {error}") from None


def encode(manifest: Manifest) -> bytes:
    """The file's bytes: indented JSON."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
