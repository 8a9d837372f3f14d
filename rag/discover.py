"""Find the files to read under the paths that a person names, and say why any is left out.

Looks at names, kinds and sizes; opens nothing.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rag.errors import RagError
from rag.parse import SUFFIXES

LARGEST_BYTES = 100 << 20

_FOLDERS = frozenset(
    [
        "node_modules",
        "__pycache__",
        "__pypackages__",
        "site-packages",
        "venv",
        "bower_components",
        "lost+found",
    ]
)


class MissingPath(RagError):
    def __init__(self, path: Path) -> None:
        super().__init__(f"there is no file or folder {str(path)!r}: check the path")


@dataclass(frozen=True, slots=True)
class Found:
    """A file to read. `name` is its path below the folder that was named, with forward slashes."""

    path: Path
    name: str
    root: Path
    size_bytes: int
    modified_ns: int


class Skipped(NamedTuple):
    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Discovery:
    """Files in the order of the paths given, sorted by name below each; no file twice."""

    files: tuple[Found, ...]
    skipped: tuple[Skipped, ...]


def walk(paths: Iterable[Path], *, largest_bytes: int = LARGEST_BYTES) -> Discovery:
    """Every file under `paths` that has a parser; hidden files and tool folders are passed over silently.

    A file named outright is reported when it cannot be taken; links are followed, loops are not.
    """
    files: dict[str, Found] = {}
    skipped: dict[str, Skipped] = {}
    for given in paths:
        root = Path(given).expanduser().absolute()
        if not root.exists():
            raise MissingPath(Path(given))
        for one in _under(root, largest_bytes):
            if isinstance(one, Skipped):
                skipped.setdefault(one.path, one)
            else:
                files.setdefault(os.path.realpath(one.path), one)
    return Discovery(files=tuple(files.values()), skipped=tuple(skipped.values()))


def _under(root: Path, largest_bytes: int) -> Iterator[Found | Skipped]:
    if not root.is_dir():
        yield _judge(root, root=root.parent, largest_bytes=largest_bytes)
        return
    folders: list[tuple[Path, tuple[str, ...]]] = [(root, (os.path.realpath(root),))]
    while folders:
        folder, above = folders.pop()
        inner: list[tuple[Path, tuple[str, ...]]] = []
        entries = _entries(folder)
        if isinstance(entries, Skipped):
            yield entries
            continue
        for path in entries:
            if path.name.startswith((".", "~$")):
                continue
            if not path.is_dir():
                yield _judge(path, root=root, largest_bytes=largest_bytes)
            elif path.name not in _FOLDERS:
                real = os.path.realpath(path)
                if real in above:
                    yield Skipped(str(path), "it is a link to a folder that holds it")
                else:
                    inner.append((path, (*above, real)))
        folders.extend(reversed(inner))


def _entries(folder: Path) -> Sequence[Path] | Skipped:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        return Skipped(str(folder), f"the folder cannot be listed ({error.strerror})")


def _judge(path: Path, *, root: Path, largest_bytes: int) -> Found | Skipped:
    try:
        status = path.stat()
    except OSError as error:
        reason = "it is a link to nothing" if path.is_symlink() else f"it cannot be read ({error.strerror})"
        return Skipped(str(path), reason)
    if not path.is_file():
        return Skipped(str(path), "it is not a plain file")
    if path.suffix.lower() not in SUFFIXES:
        kind = f"of type {path.suffix!r}" if path.suffix else "without a suffix"
        return Skipped(str(path), f"files {kind} are not supported")
    if status.st_size > largest_bytes:
        return Skipped(
            str(path), f"it is {_mib(status.st_size)}, larger than {_mib(largest_bytes)}; split it into parts"
        )
    if status.st_size == 0:
        return Skipped(str(path), "it is empty")
    return Found(
        path=path,
        name=path.relative_to(root).as_posix(),
        root=root,
        size_bytes=status.st_size,
        modified_ns=status.st_mtime_ns,
    )


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.1f} MiB"
