"""Find the files to read under the paths that a person names, and say why any is left out.

Looks at names, kinds and sizes; opens nothing.
"""

import os
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rag.errors import RagError
from rag.parse import SUFFIXES

LARGEST_BYTES = 100 << 20
_NOT_UTF8 = "its name is not UTF-8; rename it"

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
    """`path` can be printed. `unseen`: what lies there is not known, because looking was refused."""

    path: str
    reason: str
    unseen: bool = False


@dataclass(frozen=True, slots=True)
class Discovery:
    """Files in the order of the paths given, sorted by name below each; no file twice."""

    files: tuple[Found, ...]
    skipped: tuple[Skipped, ...]


def normal(path: Path | str) -> Path:
    """One way of writing a path: absolute, without `~` and `..`."""
    return Path(os.path.abspath(os.path.expanduser(path)))  # noqa: PTH100, PTH111 - pathlib keeps `..`


def printable(path: Path) -> str:
    """The path, with bytes that are not UTF-8 as `\\xff`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def walk(
    paths: Iterable[Path], *, known: Collection[str] = (), largest_bytes: int = LARGEST_BYTES
) -> Discovery:
    """Every file under `paths` that has a parser; hidden files and tool folders are passed over silently.

    A file named outright is reported when it cannot be taken; links are followed, loops are not. MissingPath
    for a path that is not there, unless something `known` was there or below it: then it has been deleted.
    """
    files: dict[str, Found] = {}
    skipped: dict[str, Skipped] = {}
    for given in paths:
        root = normal(given)
        if is_missing(root):
            if any(Path(path).is_relative_to(root) for path in known):
                continue
            raise MissingPath(Path(given))
        for one in _under(root, largest_bytes):
            if isinstance(one, Skipped):
                skipped.setdefault(one.path, one)
            else:
                files.setdefault(os.path.realpath(one.path), one)
    return Discovery(files=tuple(files.values()), skipped=tuple(skipped.values()))


def is_missing(path: Path) -> bool:
    """Whether nothing is there; False for what cannot be looked at."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False  # it is reported where it is looked at
    return False


def _under(root: Path, largest_bytes: int) -> Iterator[Found | Skipped]:
    if printable(root) != str(root):
        yield Skipped(printable(root), _NOT_UTF8)
        return
    if not _is_folder(root):
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
            if printable(path) != str(path):
                yield Skipped(printable(path), _NOT_UTF8)
            elif not _is_folder(path):
                yield _judge(path, root=root, largest_bytes=largest_bytes)
            elif path.name not in _FOLDERS:
                real = os.path.realpath(path)
                if real in above:
                    yield Skipped(printable(path), "it is a link to a folder that holds it")
                else:
                    inner.append((path, (*above, real)))
        folders.extend(reversed(inner))


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 - pathlib raises where a folder cannot be entered


def _entries(folder: Path) -> Sequence[Path] | Skipped:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        return Skipped(printable(folder), f"the folder cannot be listed ({error.strerror})", unseen=True)


def _judge(path: Path, *, root: Path, largest_bytes: int) -> Found | Skipped:
    try:
        status = path.stat()
    except OSError as error:
        dangling = os.path.islink(path)  # noqa: PTH114 - as in `_is_folder`
        reason = "it is a link to nothing" if dangling else f"it cannot be read ({error.strerror})"
        return Skipped(str(path), reason, unseen=not dangling)
    if not stat.S_ISREG(status.st_mode):
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
