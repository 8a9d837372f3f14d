"""The store under LQ_HOME: names to files, additions that are all there or not at all.

models/NAME/ holds an entry and its manifest.json; tmp/pulls/NAME what an interrupted pull left; locks/ one
lock a name. Fetching is the sources' business, recognising formats models/kinds.py's.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import platformdirs

from models import kinds, manifest
from models.catalog import CatalogEntry, catalog
from models.errors import ModelsError
from models.fetch import changed, fetch, parsed, source_of
from models.gguf import read_header
from models.manifest import BrokenManifest, FileRecord, Kind, Manifest
from models.missing import ContentChanged, NameTaken, UnknownModel, WrongKind
from models.reference import LocalReference, Reference, check_name, new_name
from models.source import Fetched, Progress, disk_errors, sha256_of, silent
from models.staging import Stage, locked

__all__ = [
    "ContentChanged", "Entry", "Manifest", "NameTaken", "Progress", "Store", "UnknownModel", "WrongKind",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored model; `path` is its folder."""

    path: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        """The name it is stored under."""
        return self.manifest.name

    @property
    def kind(self) -> Kind:
        """What it is, as found when it was stored."""
        return self.manifest.kind

    @property
    def file(self) -> Path:
        """The one GGUF of a gguf entry or a GGUF adapter (the first piece when split)."""
        return kinds.first_gguf(self.path)


class Store:
    """Entries below one folder; safe for several processes at once."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root).expanduser().absolute()

    @classmethod
    def default(cls) -> "Store":
        """The store at LQ_HOME, else in the platform's folder for user data."""
        home = os.environ.get("LQ_HOME")
        return cls(Path(home) if home else platformdirs.user_data_path("lq", appauthor=False))

    @property
    def models(self) -> Path:
        """The entries' folders."""
        return self.root / "models"

    @property
    def pulls(self) -> Path:
        """Working folders of pulls, one a name; on the same file system as the entries."""
        return self.root / "tmp" / "pulls"

    def entries(self) -> list[Entry]:
        """Every readable entry, by name."""
        return [entry for entry, problem in self._scan() if entry and not problem]

    def broken(self) -> list[tuple[str, str]]:
        """Folders whose manifest cannot be read: (name, reason)."""
        return [problem for _, problem in self._scan() if problem]

    def partial(self) -> list[tuple[str, int]]:
        """Interrupted pulls: (name, bytes kept for a rerun)."""
        folder = self.pulls
        stages = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        return [(stage.name, _bytes_below(stage)) for stage in stages]

    def get(self, name: str) -> Entry:
        """The entry called `name`; raises UnknownModel with what may be meant."""
        folder = self.models / check_name(name)
        if not folder.is_dir():
            raise UnknownModel(name, [entry.name for entry in self.entries()])
        return Entry(folder, manifest.read(folder))

    def pull(self, reference: str, *, name: str | None = None, progress: Progress | None = None) -> Entry:
        """Fetch a reference into the store; what is there already is not fetched again.

        Raises ContentChanged where a path holds something else than it did when it was stored.
        """
        listed = catalog().get(reference)
        target = parsed(reference)
        name = new_name(name, listed.name if listed else target.default_name)
        return self._put(
            name,
            target,
            source_of(target),
            lambda stage, report: fetch(target, stage, report),
            listed=listed,
            progress=progress or silent,
        )

    def add(
        self,
        path: Path,
        *,
        name: str | None = None,
        kind: Kind | None = None,
        source: str | None = None,
        revision: str | None = None,
        licence: str | None = None,
        replace: bool = False,
        progress: Progress | None = None,
    ) -> Entry:
        """Copy a file or folder of this machine into the store, noting where it came from.

        `replace`: an entry of the same source that has other content by now gives way.
        """
        local = LocalReference(str(path), Path(path).expanduser().absolute())
        source = source or source_of(local)

        def copy(stage: Stage, report: Progress) -> Fetched:
            fetch(local, stage, report)
            return Fetched(source, revision, licence)

        target = new_name(name, local.default_name)
        return self._put(target, local, source, copy, kind=kind, replace=replace, progress=progress or silent)

    def check_free(self, path: Path, *, name: str) -> None:
        """Raise what `add(path, name=name, replace=True)` would for a name that holds something else."""
        if (self.models / check_name(name)).is_dir():
            self._existing(name, source_of(LocalReference(str(path), Path(path).expanduser().absolute())))

    def remove(self, name: str, *, progress: Progress | None = None) -> None:
        """Delete an entry, or what an interrupted pull of that name left; waits for a pull that goes on."""
        folder, stage = self.models / check_name(name), Stage(self.pulls / name)
        self._refuse_unknown(name)
        with locked(self._lock(name), what=name, progress=progress or silent):
            self._refuse_unknown(name)  # another process may have removed it meanwhile
            if folder.is_dir():
                stage.discard()
                stage.folder.parent.mkdir(parents=True, exist_ok=True)
                folder.rename(stage.folder)
            shutil.rmtree(stage.folder)

    def _refuse_unknown(self, name: str) -> None:
        if not (self.models / name).is_dir() and not (self.pulls / name).is_dir():
            raise UnknownModel(name, [entry.name for entry in self.entries()])

    def resolve_or_pull(self, text: str, *, progress: Progress | None = None) -> Path:
        """resolve_model, after pulling a catalogue name that is not here yet."""
        if text in catalog() and not (self.models / text).is_dir():
            self.pull(text, progress=progress)
        return self.resolve_model(text)

    def resolve_model(self, text: str) -> Path:
        """The GGUF that a store name or path means, its header checked."""
        path = self._path_of(text, "gguf", "quantize a checkpoint first: `lq quantize NAME --out DIR`")
        file = path if path.is_file() else kinds.first_gguf(path)
        read_header(file).require("model")
        return file

    def resolve_checkpoint(self, text: str) -> Path:
        """The folder of a full-precision checkpoint."""
        return self._path_of(text, "checkpoint", "give config.json with .safetensors files")

    def resolve_embedder(self, text: str) -> Path:
        """The folder of an embedder."""
        return self._path_of(text, "embedder", "`lq pull all-minilm-l6-v2` fetches one")

    def resolve_adapter(self, text: str) -> Path:
        """The folder of a PEFT adapter, or the file of a GGUF adapter."""
        path = self._path_of(text, "adapter", "give a PEFT adapter's folder or a GGUF adapter")
        if path.is_file() or (path / "adapter_config.json").exists():
            return path
        return kinds.first_gguf(path)

    def _path_of(self, text: str, wanted: Kind, remedy: str) -> Path:
        """A store name first, then a path; of the wanted kind either way."""
        is_path = "/" in text or "\\" in text or text.endswith(".gguf") or text in (".", "..")
        if not is_path and (self.models / text).is_dir():
            path, found = self.models / text, self.get(text).kind
        else:
            path = Path(text).expanduser().absolute()
            if not path.exists() and not is_path:
                raise UnknownModel(text, [entry.name for entry in self.entries()])
            found = kinds.detect_path(path)
        if found != wanted:
            raise WrongKind(text, found, wanted, remedy)
        return path

    def _put(
        self,
        name: str,
        reference: Reference,
        source: str,
        bring: Callable[[Stage, Progress], Fetched],
        *,
        kind: Kind | None = None,
        replace: bool = False,
        listed: CatalogEntry | None = None,
        progress: Progress,
    ) -> Entry:
        """Fetch into a stage and publish it, once, whoever else tries at the same time."""
        stage, target = Stage(self.pulls / name), self.models / name
        with disk_errors(self.root), locked(self._lock(name), what=name, progress=progress):
            stage.restore(target)
            if target.exists():
                entry = self._existing(name, source)
                if not changed(reference, entry.manifest.files):
                    return entry
                if not replace:
                    raise ContentChanged(name, source)
            stage.prepare(source)
            try:
                fetched = bring(stage, progress)
                found = kind or kinds.detect(stage.content)
            except ModelsError:
                if isinstance(reference, LocalReference) or stage.is_empty:
                    stage.discard()  # nothing that the same pull could go on from
                raise
            licence = listed.licence if listed else fetched.licence or kinds.licence(stage.content)
            record = Manifest(
                name=name,
                kind=found,
                source=source,
                revision=fetched.revision,
                licence=licence,
                files=tuple(_records(stage.content, progress)),
                added_at=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            (stage.content / manifest.FILE_NAME).write_bytes(manifest.encode(record))
            stage.publish(target)
        return Entry(target, record)

    def _existing(self, name: str, source: str) -> Entry:
        entry = self.get(name)
        if entry.manifest.source != source:
            raise NameTaken(name, entry.manifest.source)
        return entry

    def _scan(self) -> Iterator[tuple[Entry | None, tuple[str, str] | None]]:
        folders = sorted(self.models.iterdir()) if self.models.is_dir() else []
        for folder in folders:
            if not folder.is_dir():
                continue
            try:
                yield Entry(folder, manifest.read(folder)), None
            except BrokenManifest as error:
                yield None, (folder.name, str(error))

    def _lock(self, name: str) -> Path:
        return self.root / "locks" / f"{name}.lock"


def _records(folder: Path, progress: Progress) -> Iterator[FileRecord]:
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        progress(f"hashing {name}", 0, None)
        yield FileRecord(name, path.stat().st_size, sha256_of(path))


def _bytes_below(folder: Path) -> int:
    """Of a folder in which another process may be at work."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total
