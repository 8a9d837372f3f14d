"""A full-precision GGUF as it is after some exact changes, tensor by tensor, and the file that holds it.

Owns how changes are applied to weights, metadata and the moments of activations; which ones there are is
`quantize.transforms.kinds`'. A tensor is in memory only while it is asked for.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from models.atomic import whole
from models.gguf import Header, TensorInfo, read_header
from models.lora_gguf import TRANSFORMS
from models.tensor_types import TensorType
from quantize.calibration.imatrix import Entry as Squares
from quantize.calibration.imatrix import ImportanceMatrix
from quantize.disk import disk_errors
from quantize.errors import QuantizeError
from quantize.gguf_files.floats import Dtype, from_float32
from quantize.gguf_files.header import Entry, lay_out
from quantize.gguf_files.mixed_file import MixedSource
from quantize.network.hessian import InputMoments, NoHessian
from quantize.network.shape import Shape, read_shape
from quantize.network.weights import NoSuchTensor, WeightFile
from quantize.transforms.maps import Map, moments, rows

#: (tensor, bytes done, bytes in all)
Progress = Callable[[str, int, int], None]


class Beyond(QuantizeError):
    """A changed weight that the type of the file cannot hold."""

    def __init__(self, name: str, kind: str, largest: float) -> None:
        super().__init__(f"tensor {name} holds {largest:.4g} once it is changed, beyond {kind}; write F32")


@dataclass(frozen=True, slots=True)
class Fold:
    """One exact change. `columns`: tensor -> the map of what it reads (of the embedding: of what a lookup
    gives); `rows`: tensor -> the map of what it makes; `values`: metadata that changes with them; `added`:
    vectors of so many zeros. `corrects`: biases are to be corrected once the weights are rounded."""

    name: str
    columns: Mapping[str, Map] = field(default_factory=dict)
    rows: Mapping[str, Map] = field(default_factory=dict)
    values: Mapping[str, int | float] = field(default_factory=dict)
    added: Mapping[str, int] = field(default_factory=dict)
    corrects: bool = False

    def touches(self, name: str) -> bool:
        """Whether a tensor changes, or is new."""
        return name in self.columns or name in self.rows or name in self.added

    def apply(self, name: str, weights: np.ndarray) -> np.ndarray:
        """A tensor after the change, (rows, n) or (n,) as it came."""
        if name in self.columns:
            weights = self.columns[name].backward(weights)
        if name in self.rows:
            weights = rows(self.rows[name], weights)
        return weights


@dataclass(frozen=True)
class Folded:
    """A source under changes, in their order. `hessians` are the source's, before them."""

    source: MixedSource
    hessians: InputMoments
    folds: tuple[Fold, ...] = ()

    @classmethod
    def open(cls, path: Path, hessians: InputMoments) -> "Folded":
        """Unchanged as yet; raises InvalidGGUF or NotFullPrecision."""
        return cls(MixedSource.open(path), hessians)

    def then(self, fold: Fold) -> "Folded":
        """With one more change."""
        return replace(self, folds=(*self.folds, fold))

    @cached_property
    def header(self) -> Header:
        """The source's."""
        return read_header(self.source.path)

    @cached_property
    def model(self) -> Shape:
        """What the source computes; raises UnsupportedNetwork."""
        return read_shape(self.header)

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The source's own."""
        return {tensor.name: tensor for tensor in self.source.tensors}

    @cached_property
    def _files(self) -> dict[Path, WeightFile]:
        return {path: WeightFile.open(path) for path in set(self.source.files.values())}

    @cached_property
    def added(self) -> tuple[str, ...]:
        """Tensors that the source does not have."""
        return tuple(name for fold in self.folds for name in fold.added)

    @property
    def corrects(self) -> bool:
        """Whether biases are to be corrected once the weights are rounded."""
        return any(fold.corrects for fold in self.folds)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors or name in self.added

    def __iter__(self) -> Iterator[str]:
        return iter((*self.tensors, *self.added))

    def touched(self, name: str) -> tuple[str, ...]:
        """Names of the changes that matter for a tensor: up to the last one that touches it."""
        last = max((i for i, fold in enumerate(self.folds) if fold.touches(name)), default=-1)
        return tuple(fold.name for fold in self.folds[: last + 1])

    def array(self, name: str) -> np.ndarray:
        """A tensor as a new float32 array, (rows, n) or (n,)."""
        weights = self._files[self.source.files[name]].array(name) if name in self.tensors else None
        for fold in self.folds:
            if name in fold.added:
                weights = np.zeros(fold.added[name], np.float32)
            elif weights is not None:
                weights = fold.apply(name, weights)
        if weights is None:
            raise NoSuchTensor(self.source.path, name)
        return weights

    def shape(self, name: str) -> tuple[int, ...]:
        """As `array` will have it."""
        shape = self.tensors[name].shape[::-1] if name in self.tensors else (0,)
        for fold in self.folds:
            *n_rows, width = (fold.added[name],) if name in fold.added else shape
            if name in fold.columns:
                width = fold.columns[name].backward(np.empty((0, width), np.float32)).shape[-1]
            if name in fold.rows:
                made = n_rows[0] if n_rows else width
                made = fold.rows[name].forward(np.empty((0, made), np.float32)).shape[-1]
                n_rows, width = ([made], width) if n_rows else ([], made)
            shape = (*n_rows, width)
        return shape

    def read(self, name: str) -> np.ndarray:
        """E[x x^T] of what a tensor reads after the changes; raises NoHessian."""
        found = self.hessians.read(name)
        for fold in self.folds:
            if name in fold.columns:
                found = moments(fold.columns[name], found)
        return found

    def mean(self, name: str) -> np.ndarray:
        """E[x] of what a tensor reads after the changes; raises NoHessian."""
        found = self.hessians.mean(name)
        for fold in self.folds:
            if name in fold.columns:
                found = fold.columns[name].forward(found)
        return found

    def count(self, name: str) -> int:
        """Tokens that `read` and `mean` are means over."""
        return self.hessians.count(name)

    def importance(self, matrix: ImportanceMatrix) -> ImportanceMatrix:
        """The source's importance matrix after the changes."""
        return replace(matrix, entries={name: self._squares(name, e) for name, e in matrix.entries.items()})

    def _squares(self, name: str, entry: Squares) -> Squares:
        """By the squares alone where they say enough, else from the second moments.

        What has none either is a lookup that was rotated: its squares are then about alike.
        """
        changes = [fold.columns[name] for fold in self.folds if name in fold.columns]
        if not changes:
            return entry
        squares: np.ndarray | None = entry.sums[0]
        for change in changes:
            squares = None if squares is None else change.squares(squares)
        if squares is None:
            squares = self._from_moments(name, entry)
        return Squares(squares[None], entry.counts)

    def _from_moments(self, name: str, entry: Squares) -> np.ndarray:
        """(n,) sums of squares by the Hessian, or all alike."""
        try:
            return np.diagonal(self.read(name)).astype(np.float64) * entry.counts[0]
        except NoHessian:
            return np.full(self.shape(name)[-1], entry.sums[0].mean())

    def write(
        self, out: Path, *, dtype: Literal["F32", "source"] = "F32", progress: Progress | None = None
    ) -> Header:
        """Write the changed model; it is whole or not there. Tensors that no change touches stay as they are.

        `dtype`: what changed matrices are stored as; the source's type rounds them, so that the change is no
        longer exact.
        """
        entries = [self._entry(tensor, dtype) for tensor in self.source.tensors]
        entries += [Entry(name, self.shape(name), TensorType["F32"]) for name in self.added]
        values: dict[str, int | float | str] = {}
        for fold in self.folds:
            values |= fold.values
        if changes := [fold.name for fold in self.folds if fold.columns or fold.rows]:
            values[TRANSFORMS] = ",".join(changes)
        alignment = self.source.alignment
        layout = lay_out(self.source.metadata.updated(values), entries, alignment)
        with disk_errors(out), whole(out) as partial, partial.open("wb") as file:
            file.write(layout.header)
            for entry in entries:
                file.write(self._bytes(entry))
                file.write(bytes(-file.tell() % alignment))
                if progress is not None:
                    progress(entry.name, file.tell(), layout.size_bytes)
        return read_header(out)

    def _entry(self, tensor: TensorInfo, dtype: Literal["F32", "source"]) -> Entry:
        changed = bool(self.touched(tensor.name))
        kind = TensorType["F32"] if changed and dtype == "F32" else tensor.type
        return Entry(tensor.name, self.shape(tensor.name)[::-1], kind)

    def _bytes(self, entry: Entry) -> memoryview:
        if not self.touched(entry.name):
            tensor, path = self.tensors[entry.name], self.source.files[entry.name]
            return np.memmap(path, np.uint8, "r", tensor.offset, (tensor.size_bytes,)).data
        weights = self.array(entry.name)
        stored = from_float32(weights, _float(entry.type))
        if not np.isfinite(stored if entry.type.name != "BF16" else weights).all():
            raise Beyond(entry.name, entry.type.name, float(np.abs(weights).max()))
        return np.ascontiguousarray(stored).data.cast("B")


def _float(kind: TensorType) -> Dtype:
    for name in ("F32", "F16", "BF16"):
        if kind.name == name:
            return name
    raise AssertionError(kind)  # MixedSource.open lets no other through
