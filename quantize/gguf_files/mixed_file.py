"""Write a GGUF with a chosen type for each tensor, from one in full precision; it is whole or not there.

Owns the order of the work and what is kept of it between runs; how weights are rounded is the caller's
`Encode`, which bytes come before the tensors is `quantize.gguf_files.header`'s.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from models.atomic import whole
from models.footprint import pieces_of
from models.gguf import Header, TensorInfo, read_header
from models.tensor_types import TensorType
from quantize.disk import DiskFull, disk_errors
from quantize.errors import QuantizeError
from quantize.gguf_files.header import Entry, Layout, Metadata, lay_out, padded, stored_bytes
from quantize.gguf_files.parts import Encode, Parts, Rows, StoredMatrices
from quantize.gguf_files.tensor_rules import fitting_types, may_be_quantized
from quantize.gguf_files.types import ALIASES, FTYPES
from quantize.processes import side_by_side

__all__ = ["Crew", "Encode", "ImportanceNote", "MixedSource", "Parts", "Rows", "matrices", "write_mixed"]

#: (tensor, weights done, weights in all)
Progress = Callable[[str, int, int], None]
FLOATS = ("F32", "F16", "BF16")
#: What llama-quantize takes out of the first file of a split model.
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
COPY_BYTES = 16 << 20
LONGEST_NOTE = 127  # bytes: what llama.cpp's kv_override holds
LEAST_TO_SHARE = 20_000_000  # weights: fewer are rounded before other processes have started


class UnfitType(QuantizeError):
    """A type that a tensor cannot have, or a choice for a tensor that is not there."""


class NotFullPrecision(QuantizeError):
    """A source that was rounded before."""

    def __init__(self, path: Path, tensor: TensorInfo) -> None:
        super().__init__(
            f"{path}: tensor {tensor.name} is {tensor.type.name} already; a mix is made from F32, F16 or "
            "BF16 weights, give such a source"
        )


@dataclass(frozen=True, slots=True)
class ImportanceNote:
    """What llama-quantize writes about the importance matrix that it used; None: it says nothing of it."""

    file: str
    n_entries: int
    dataset: str | None = None
    n_chunks: int | None = None

    def values(self) -> dict[str, int | str]:
        """As metadata; texts are cut where llama.cpp cuts them."""
        found: dict[str, int | str] = {"quantize.imatrix.file": _cut(self.file)}
        if self.dataset:
            found["quantize.imatrix.dataset"] = _cut(self.dataset)
        found["quantize.imatrix.entries_count"] = self.n_entries
        if self.n_chunks:
            found["quantize.imatrix.chunks_count"] = self.n_chunks
        return found


@dataclass(frozen=True, slots=True)
class _Maker:
    """Rounds tensors one after the other; may be sent to another process."""

    parts: Parts
    encode: Encode
    whole_matrices: bool

    def __call__(self, wanted: Sequence[StoredMatrices], progress: Progress | None = None) -> None:
        total, done = sum(each.n_elements for each in wanted), 0
        for each in wanted:

            def tell(count: int, name: str = each.tensor.name, before: int = done) -> None:
                if progress is not None:
                    progress(name, before + count, total)

            with disk_errors(self.parts.folder):
                self.parts.make(each, self.encode, whole_matrices=self.whole_matrices, progress=tell)
            done += each.n_elements


@dataclass(frozen=True, slots=True)
class Crew:
    """Processes that round tensors side by side. `together`: tensors of one name go to one process, one after
    the other; `set_up` is called in each process first."""

    n_processes: int
    together: Callable[[str], str]
    set_up: Callable[[], object] | None = None

    def make(self, make: _Maker, wanted: Sequence[StoredMatrices], progress: Progress | None) -> None:
        """Round them all. The largest are begun first, since they end last."""
        groups: dict[str, list[StoredMatrices]] = {}
        for each in wanted:
            groups.setdefault(self.together(each.tensor.name), []).append(each)
        ordered = sorted(groups.values(), key=lambda group: -max(each.n_elements for each in group))
        total, done = sum(each.n_elements for each in wanted), 0
        for group in side_by_side(
            make, ordered, n_processes=self.n_processes, name="rounding tensors", set_up=self.set_up
        ):
            done += sum(each.n_elements for each in group)
            if progress is not None:
                progress(group[-1].tensor.name, done, total)


@dataclass(frozen=True, slots=True)
class MixedSource:
    """A full-precision GGUF, in one file or several; what a mix of its tensors may be and how large."""

    path: Path
    architecture: str | None
    alignment: int
    metadata: Metadata
    tensors: tuple[TensorInfo, ...]
    files: Mapping[str, Path]

    @classmethod
    def open(cls, path: Path) -> "MixedSource":
        """Read the header, or headers; raises InvalidGGUF or NotFullPrecision."""
        first = read_header(path).require("model")
        pieces = pieces_of(first)
        found = cls(
            path=path,
            architecture=first.architecture,
            alignment=first.alignment,
            metadata=Metadata.read(path).without(SPLIT_KEYS),
            tensors=tuple(tensor for piece in pieces for tensor in piece.tensors),
            files={tensor.name: piece.path for piece in pieces for tensor in piece.tensors},
        )
        for tensor in found.quantizable:
            if tensor.type.name not in FLOATS:
                raise NotFullPrecision(path, tensor)
        return found

    @property
    def quantizable(self) -> tuple[TensorInfo, ...]:
        """The tensors that may have another type; all others are copied as they are."""
        return tuple(t for t in self.tensors if may_be_quantized(t.name, t.shape, self.architecture))

    @property
    def n_parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(tensor.n_elements for tensor in self.tensors)

    def choices(self, types: Sequence[str]) -> dict[str, dict[str, int]]:
        """Quantizable tensor -> those of the types that its rows fit -> bytes, padding after them included.

        Raises UnfitType for a tensor whose rows fit none.
        """
        found = {}
        for tensor in self.quantizable:
            fitting = fitting_types(tensor.shape[0], types)
            if not fitting:
                raise UnfitType(
                    f"tensor {tensor.name} has rows of {tensor.shape[0]}, which the blocks of none of "
                    f"{', '.join(types)} fill; allow one of 32-wide blocks, such as Q4_0 or Q8_0, or F16"
                )
            sizes = [stored_bytes(tensor.shape, TensorType[name]) for name in fitting]
            found[tensor.name] = dict(zip(fitting, [padded(n, self.alignment) for n in sizes], strict=True))
        return found

    def layout(self, types: Mapping[str, str], note: ImportanceNote | None = None) -> Layout:
        """The file that `write_mixed` makes with these types, to the byte; raises UnfitType."""
        self._check(types)
        entries = []
        for tensor in self.tensors:
            kind = TensorType[types[tensor.name]] if tensor.name in types else tensor.type
            entries.append(Entry(tensor.name, tensor.shape, kind))
        values: dict[str, int | str] = {
            "general.quantization_version": QUANTIZATION_VERSION,
            "general.file_type": self._file_type(entries),
        }
        metadata = self.metadata.updated(values | (note.values() if note else {}))
        return lay_out(metadata, entries, self.alignment)

    def _check(self, types: Mapping[str, str]) -> None:
        quantizable = {tensor.name: tensor for tensor in self.quantizable}
        for name, kind in types.items():
            tensor = quantizable.get(name)
            if tensor is None:
                known = name in self.files
                why = "llama.cpp keeps it as it is" if known else "the model has no such tensor"
                raise UnfitType(f"tensor {name} cannot be {kind}: {why}; leave it out")
            if kind not in TensorType.__members__:
                raise UnfitType(
                    f"tensor {name}: {kind!r} is not a tensor type; give one such as Q4_0 or Q6_K"
                )
            if not fitting_types(tensor.shape[0], [kind]):
                raise UnfitType(
                    f"tensor {name} has rows of {tensor.shape[0]}, which blocks of "
                    f"{TensorType[kind].block_elements} do not fill: {kind} is not possible; choose one of "
                    "32-wide blocks, such as Q4_0, IQ4_NL, Q5_0 or Q8_0"
                )

    def _file_type(self, entries: Sequence[Entry]) -> int:
        """LLAMA_FTYPE number of the type that most numbers in matrices have."""
        counts: dict[str, int] = {}
        for tensor, entry in zip(self.tensors, entries, strict=True):
            if len(tensor.shape) > 1:
                counts[entry.type.name] = counts.get(entry.type.name, 0) + tensor.n_elements
        for name in sorted(counts, key=lambda name: -counts[name]):
            if (number := FTYPES.get(ALIASES.get(name, name))) is not None:
                return number
        return FTYPES["F32"]


def write_mixed(
    source: MixedSource,
    out: Path,
    types: Mapping[str, str],
    encode: Encode,
    *,
    parts: Parts,
    made_from: Callable[[str, str], str],
    note: ImportanceNote | None = None,
    whole_matrices: bool = False,
    progress: Progress | None = None,
    crew: Crew | None = None,
) -> Header:
    """Write `out` with `types[tensor]` for the tensors named there, all others as they are in the source.

    Each rounded tensor is kept in `parts` when it is done, under a name that hashes the tensor, its type and
    `made_from(tensor, type)`: a text that has to change whenever the bytes would (source, importance, way of
    rounding). So a run that was killed goes on, and a mix that shares tensors with an earlier one takes them
    from there. `encode` gets blocks of rows, or with `whole_matrices` a matrix at a time; with a `crew` in
    processes beside this one, to which it is sent. The file's size is
    `source.layout(types, note).size_bytes`. Raises UnfitType, DiskFull and what `encode` raises; then nothing
    is at `out` that was not.
    """
    layout = source.layout(types, note)
    if out.resolve() in {path.resolve() for path in source.files.values()}:
        raise QuantizeError(f"{out} is the source itself; choose another --out")
    parts.sweep()
    wanted = matrices(source, types, made_from)
    missing = [each for each in wanted if each.key is not None and not parts.has(each)]
    out.parent.mkdir(parents=True, exist_ok=True)
    _refuse_full_disk(out, layout.size_bytes + sum(each.size_bytes for each in missing))
    make = _Maker(parts, encode, whole_matrices)
    if (
        crew is not None
        and crew.n_processes > 1
        and sum(each.n_elements for each in missing) >= LEAST_TO_SHARE
    ):
        crew.make(make, missing, progress)
    else:
        make(missing, progress)
    with disk_errors(out), whole(out) as partial, partial.open("wb") as file:
        file.write(layout.header)
        for each in wanted:
            _append(file, each, parts)
            file.write(bytes(-file.tell() % source.alignment))
    return read_header(out)


def matrices(
    source: MixedSource, types: Mapping[str, str], made_from: Callable[[str, str], str]
) -> list[StoredMatrices]:
    """All tensors of a mix in the file's order; those whose type is the source's own are not rounded."""
    found = []
    for tensor in source.tensors:
        kind = types.get(tensor.name, tensor.type.name)
        key = made_from(tensor.name, kind) if kind != tensor.type.name else None
        found.append(StoredMatrices(source.files[tensor.name], tensor, TensorType[kind], key))
    return found


def _append(file: BinaryIO, wanted: StoredMatrices, parts: Parts) -> None:
    """A finished part, or the source's own bytes."""
    path, start = wanted.file, wanted.tensor.offset
    if wanted.key is not None:
        path, start = parts.path(wanted), 0
    left = wanted.size_bytes
    with path.open("rb") as source:
        source.seek(start)
        while left:
            data = source.read(min(left, COPY_BYTES))
            if not data:
                raise QuantizeError(f"{path} became shorter while it was read; run the same command again")
            file.write(data)
            left -= len(data)


def _refuse_full_disk(out: Path, needed: int) -> None:
    if shutil.disk_usage(out.parent).free < needed:
        raise DiskFull(out, f"it needs {needed / 1e6:.0f} MB, finished tensors beside it included")


def _cut(text: str) -> str:
    return text.encode("utf-8")[:LONGEST_NOTE].decode("utf-8", "ignore")
