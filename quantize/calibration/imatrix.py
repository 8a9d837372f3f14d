"""An importance matrix and its file, in llama.cpp's imatrix GGUF format.

Owns the sums, the counts and the bytes on disk. How they were collected is `importance`'s matter.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from models.atomic import whole
from quantize.errors import QuantizeError


class InvalidMatrix(QuantizeError):
    """A file that is not an importance matrix."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{path} is not an importance matrix: {reason}; give a GGUF that llama-imatrix or lq wrote"
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor's statistics: `sums` (n_matrices, ne0) of squared inputs, `counts` (n_matrices,) of rows."""

    sums: np.ndarray
    counts: np.ndarray

    def means(self) -> np.ndarray:
        """Mean squares, float32 (n_matrices * ne0,); 1 where an expert saw no token, as in llama-quantize."""
        counts = self.counts.astype(np.float64)[:, None]
        means = np.where(counts > 0, self.sums / np.maximum(counts, 1), 1.0)
        return means.astype(np.float32).reshape(-1)


@dataclass(frozen=True, slots=True)
class ImportanceMatrix:
    """Entries by tensor name. `chunk_size` and `n_chunks` are what readers show, in tokens and passes."""

    entries: Mapping[str, Entry]
    datasets: tuple[str, ...]
    n_chunks: int
    chunk_size: int

    def means(self) -> dict[str, np.ndarray]:
        """Mean squares by tensor name, as llama.cpp's quantize call takes them."""
        return {name: entry.means() for name, entry in self.entries.items()}

    def write(self, path: Path) -> None:
        """Save in llama.cpp's format; appears whole or not at all."""
        writer = gguf.GGUFWriter(None, arch="")
        writer.kv_data[0].pop(gguf.Keys.General.ARCHITECTURE, None)
        writer.add_string("general.type", "imatrix")
        writer.add_array("imatrix.datasets", list(self.datasets))
        writer.add_uint32("imatrix.chunk_count", self.n_chunks)
        writer.add_uint32("imatrix.chunk_size", self.chunk_size)
        for name, entry in sorted(self.entries.items()):
            writer.add_tensor(f"{name}.in_sum2", entry.sums.astype(np.float32))
            writer.add_tensor(f"{name}.counts", entry.counts.astype(np.float32)[:, None])
        with whole(path) as partial:
            writer.write_header_to_file(partial)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()

    @classmethod
    def read(cls, path: Path) -> "ImportanceMatrix":
        """Load and check a file written here or by llama-imatrix."""
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, KeyError, IndexError) as error:
            raise InvalidMatrix(path, str(error)) from None
        if _field(reader, "general.type") != "imatrix":
            raise InvalidMatrix(path, f"general.type is {_field(reader, 'general.type')!r}")
        return cls(
            entries=dict(_pairs(path, reader.tensors)),
            datasets=tuple(_field(reader, "imatrix.datasets") or ()),
            n_chunks=int(_field(reader, "imatrix.chunk_count") or 0),
            chunk_size=int(_field(reader, "imatrix.chunk_size") or 0),
        )


def _field(reader: gguf.GGUFReader, key: str):
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _pairs(path: Path, tensors: Iterable[gguf.ReaderTensor]) -> Iterable[tuple[str, Entry]]:
    """(name, entry) for every `.in_sum2` with its `.counts`; data is copied out of the mapped file."""
    by_name = {tensor.name: tensor for tensor in tensors}
    for name, tensor in by_name.items():
        base = name.removesuffix(".in_sum2")
        if base == name:
            continue
        counts = by_name.get(f"{base}.counts")
        if counts is None:
            raise InvalidMatrix(path, f"{name} has no counts beside it")
        numbers = np.array(counts.data, np.float64).reshape(-1)
        sums = np.array(tensor.data, np.float64).reshape(len(numbers), -1)
        if not np.isfinite(sums).all():
            raise InvalidMatrix(path, f"{name} holds numbers that are not finite")
        yield base, Entry(sums, numbers)
