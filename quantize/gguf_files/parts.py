"""Rounded tensors on the disk, one file each, by a hash of what they were made from.

A part appears whole or not at all, so what is there is done. Owns reading the source's rows in blocks and
asking for their rounding; knows no GGUF.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from models.atomic import LEFT_BEHIND, whole
from models.gguf import TensorInfo
from models.tensor_types import TensorType
from models.tensors import to_float32
from quantize.errors import QuantizeError
from quantize.gguf_files.floats import LARGEST_FLOAT16, Dtype, from_float32

#: Changes when the same inputs come to other bytes.
VERSION = 1
#: Float32 weights that are in memory at a time, but for whole matrices.
BLOCK_BYTES = 32 << 20
STORED = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


class BadWeights(QuantizeError):
    """Weights that no type of this kind can hold."""


class WrongRounding(QuantizeError):
    """An encoder that returned something else than rows of its type."""

    def __init__(self, rows: "Rows", found: np.ndarray, row_bytes: int) -> None:
        super().__init__(
            f"tensor {rows.tensor} as {rows.type}: the rounding gave {found.dtype} {list(found.shape)}, "
            f"expected uint8 {[len(rows.weights), row_bytes]}"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What is to be rounded: `weights` (rows, n) float32, from `first_row` on of one matrix of a tensor.

    `matrix` is the expert's number in a mixture of experts, else 0; `n_rows` are all that the matrix has.
    """

    tensor: str
    type: str
    matrix: int
    first_row: int
    n_rows: int
    weights: np.ndarray


#: Rows -> (rows, row_bytes) uint8.
Encode = Callable[[Rows], np.ndarray]


@dataclass(frozen=True, slots=True)
class StoredMatrices:
    """A tensor in full precision in a file, and the type that it is to have.

    `key` says what its bytes depend on; None: it stays as it is.
    """

    file: Path
    tensor: TensorInfo
    type: TensorType
    key: str | None

    @property
    def part(self) -> str:
        """Name of its part: its type, and a hash of what its bytes depend on."""
        identity = [VERSION, self.tensor.name, self.tensor.shape, self.type.name, self.key]
        return f"{self.type.name}-{hashlib.sha256(repr(identity).encode()).hexdigest()[:40]}.tensor"

    @property
    def n_elements(self) -> int:
        """Numbers in it."""
        return self.tensor.n_elements

    @property
    def row_bytes(self) -> int:
        """Bytes of a rounded row."""
        return self.tensor.shape[0] // self.type.block_elements * self.type.block_bytes

    @property
    def size_bytes(self) -> int:
        """Bytes of all of it, rounded."""
        return self.n_elements // self.tensor.shape[0] * self.row_bytes

    def blocks(self, *, whole_matrices: bool = False) -> Iterator[Rows]:
        """The weights in order, a block of one matrix at a time."""
        width, n_rows, *others = (*self.tensor.shape, 1)
        step = n_rows if whole_matrices else max(1, BLOCK_BYTES // (4 * width))
        for matrix in range(math.prod(others)):
            for first in range(0, n_rows, step):
                count = min(step, n_rows - first)
                weights = self._read((matrix * n_rows + first) * width, count * width).reshape(count, width)
                yield Rows(self.tensor.name, self.type.name, matrix, first, n_rows, weights)

    def _read(self, first: int, count: int) -> np.ndarray:
        dtype = STORED[self.tensor.type.name]
        with self.file.open("rb") as file:  # read, not mapped: mapped pages would count as ours
            file.seek(self.tensor.offset + first * dtype.itemsize)
            stored = np.fromfile(file, dtype, count)
        if stored.size != count:
            raise QuantizeError(f"{self.file} became shorter while it was read; run the same command again")
        values = to_float32(stored)
        if not np.isfinite(values).all():
            raise BadWeights(
                f"{self.file}: tensor {self.tensor.name} holds numbers that are not finite; "
                "download or convert the model again"
            )
        return values


@dataclass(frozen=True, slots=True)
class Parts:
    """The folder of finished tensors; one process at a time works in it."""

    folder: Path

    def sweep(self) -> None:
        """Remove what a process left that was killed while it wrote."""
        for path in self.folder.glob(LEFT_BEHIND):
            path.unlink()

    def path(self, wanted: StoredMatrices) -> Path:
        """Where the part lies, if it is done."""
        return self.folder / wanted.part

    def has(self, wanted: StoredMatrices) -> bool:
        """Whether it is done."""
        path = self.path(wanted)
        return path.is_file() and path.stat().st_size == wanted.size_bytes

    def make(
        self,
        wanted: StoredMatrices,
        encode: Encode,
        *,
        whole_matrices: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Round one tensor; the float types are rounded here, all others by `encode`."""
        done = 0
        with whole(self.path(wanted)) as partial, partial.open("wb") as file:
            for rows in wanted.blocks(whole_matrices=whole_matrices):
                found = as_float(rows) if wanted.type.name in STORED else encode(rows)
                if found.dtype != np.uint8 or found.shape != (len(rows.weights), wanted.row_bytes):
                    raise WrongRounding(rows, found, wanted.row_bytes)
                file.write(np.ascontiguousarray(found).data.cast("B"))
                done += rows.weights.size
                if progress is not None:
                    progress(done)

    def prune(self, keep: Iterable[StoredMatrices] = ()) -> None:
        """Remove all parts but these, to free the disk."""
        kept = {self.path(each) for each in keep if each.key is not None}
        for path in self.folder.glob("*.tensor"):
            if path not in kept:
                path.unlink()


def as_float(rows: Rows) -> np.ndarray:
    """Rows in a float type, (rows, row_bytes) uint8; raises BadWeights for what float16 cannot hold."""
    largest = float(np.abs(rows.weights).max(initial=0))
    if rows.type == "F16" and largest > LARGEST_FLOAT16:
        raise BadWeights(f"tensor {rows.tensor} holds {largest:.4g}, beyond float16; choose BF16 or F32")
    stored = from_float32(rows.weights, cast("Dtype", rows.type))
    return np.ascontiguousarray(stored).view(np.uint8).reshape(len(stored), -1)
