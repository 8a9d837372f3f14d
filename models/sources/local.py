"""Copy a file or folder of this machine into a stage.

Copied, never linked: an original that is edited later must not change what the store has hashed.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from models.atomic import whole
from models.kinds import refuse_pickles, wanted
from models.manifest import FileRecord
from models.reference import LocalReference
from models.source import PICKLE_SUFFIXES, Fetched, FetchFailed, Progress, sha256_of
from models.staging import Stage

_CHUNK_BYTES = 8 << 20


def fetch(reference: LocalReference, stage: Stage, progress: Progress) -> Fetched:
    """Copy what is wanted of the path; files that an interrupted run completed are not copied again."""
    files = _files(reference.path)
    stage.keep(files)
    total = sum(path.stat().st_size for path in files.values())
    done = 0
    for name, path in files.items():
        done = _copy(path, stage.content / name, done, total, progress)
    return Fetched(source=f"file:{reference.path}")


def changed(reference: LocalReference, records: Sequence[FileRecord]) -> bool:
    """Whether the path's files are others than the records say; content is read where all sizes agree."""
    files = _files(reference.path)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    if sizes != {record.path: record.size_bytes for record in records}:
        return True
    return any(sha256_of(files[record.path]) != record.sha256 for record in records)


def _files(path: Path) -> dict[str, Path]:
    """Path inside the entry -> file to copy."""
    if path.is_file():
        if path.suffix in PICKLE_SUFFIXES:
            refuse_pickles(str(path), [path.name])
        if path.suffix != ".gguf":
            raise FetchFailed(f"{path}: a single file must be a .gguf; for a checkpoint give its folder")
        return {path.name: path}
    if not path.is_dir():
        raise FetchFailed(f"{path}: no such file or folder; check the path")
    found = {item.relative_to(path).as_posix(): item for item in path.rglob("*") if item.is_file()}
    names = wanted(found)
    if not any(name.endswith(".safetensors") for name in names):
        names = sorted(name for name in found if name.endswith(".gguf") and "/" not in name)
    if not names:
        refuse_pickles(str(path), found)
        raise FetchFailed(f"{path}: the folder holds no model files; give a checkpoint's folder or a .gguf")
    return {name: found[name] for name in names}


def _copy(source: Path, target: Path, done: int, total: int, progress: Progress) -> int:
    """Copy one file with its times, by which a rerun knows it; returns the bytes done so far."""
    size = source.stat()
    if target.exists() and target.stat().st_size == size.st_size and target.stat().st_mtime == size.st_mtime:
        return done + size.st_size
    with whole(target) as partial:
        with source.open("rb") as reader, partial.open("wb") as writer:
            while chunk := reader.read(_CHUNK_BYTES):
                writer.write(chunk)
                done += len(chunk)
                progress(f"copying {source.name}", done, total)
        shutil.copystat(source, partial)
    return done
