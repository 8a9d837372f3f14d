"""Pack tensors that lie on a quantization lattice without loss, in any format that holds it.

A checkpoint trained for a format (QAT), or dequantized from a file, keeps there what it is; rounding it anew
would lose some. Owns which formats hold which lattices, the search through a file, and the packing; whether a
block of weights lies on a lattice is `quantize.rounding.lattice`'s.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from models.gguf import TensorInfo, read_header
from models.tensor_types import TensorType
from quantize.gguf_files.floats import Dtype
from quantize.gguf_files.mixed_file import MixedSource
from quantize.gguf_files.packing import Blocks, Format, block_format, pack, unpack, values
from quantize.gguf_files.parts import Encode, Rows, StoredMatrices
from quantize.gguf_files.tensor_rules import fitting_types
from quantize.rounding.lattice import LATTICES, find_lattice

#: Lattice -> formats whose blocks hold its values, to the bit.
HOLDERS: Mapping[str, tuple[str, ...]] = {
    "Q4_0": ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    "IQ4_NL": ("IQ4_NL", "Q8_0"),
    "Q4_1": ("Q4_1", "Q5_1"),
    "Q5_0": ("Q5_0", "Q5_1", "Q8_0"),
    "Q5_1": ("Q5_1",),
    "Q8_0": ("Q8_0",),
}

#: Larger weights count as on no lattice: Q5_1's minimum is 16 scales, and float16 numbers end at 65504.
LARGEST = 1024.0

Progress = Callable[[str, int, int], None]  # tensor, weights done, in all
Errors = Callable[[str, np.ndarray], Iterator[tuple[str, np.ndarray]]]


@dataclass(frozen=True, slots=True)
class OnLattice:
    """A tensor's lattice, and the dtype that it is stored in.

    `is_exact`: packed, dequantized and stored again every weight is the same; else the lattice's scales are
    no float16 numbers, and weights change by at most `largest_error` steps.
    """

    type: str
    stored: Dtype
    is_exact: bool
    largest_error: float


def find_lattices(source: MixedSource, *, progress: Progress | None = None) -> dict[str, OnLattice]:
    """The tensors of a model that lie on one, whole; for ordinary weights this looks at samples alone."""
    total, done, found = sum(tensor.n_elements for tensor in source.quantizable), 0, {}
    for tensor in source.quantizable:
        first = next(iter(stored_matrices(source, tensor).blocks())).weights  # is enough for most
        for kind in fitting_types(tensor.shape[0], LATTICES):
            if _fits(first, tensor, kind) and (one := _lies_on(source, tensor, kind)) is not None:
                found[tensor.name] = one
                break
        done += tensor.n_elements
        if progress is not None:
            progress(tensor.name, done, total)
    return found


def _fits(weights: np.ndarray, tensor: TensorInfo, kind: str) -> bool:
    return find_lattice(weights, stored=cast("Dtype", tensor.type.name), types=(kind,)) is not None


def _lies_on(source: MixedSource, tensor: TensorInfo, kind: str) -> OnLattice | None:
    """The tensor on a lattice of this kind, None at the first block of rows that is not."""
    dtype = cast("Dtype", tensor.type.name)
    exact, largest = True, 0.0
    for rows in stored_matrices(source, tensor).blocks():
        found = find_lattice(rows.weights, stored=dtype, types=(kind,))
        if found is None or np.abs(rows.weights).max(initial=0) > LARGEST:
            return None
        exact, largest = exact and found.is_exact, max(largest, found.largest_error)
    return OnLattice(kind, dtype, exact, largest)


def stored_matrices(source: MixedSource, tensor: TensorInfo) -> StoredMatrices:
    """A tensor of the source, to be read."""
    return StoredMatrices(source.files[tensor.name], tensor, tensor.type, None)


def pack_exactly(weights: np.ndarray, kind: str, lattice: OnLattice) -> np.ndarray | None:
    """(rows, row_bytes) uint8 of (rows, n) float32 weights on the lattice; None if `kind` cannot hold it."""
    if kind not in HOLDERS[lattice.type]:
        return None
    found = find_lattice(weights, stored=lattice.stored, types=(lattice.type,))
    if found is None or kind == lattice.type:
        return None if found is None else found.data
    form, wider = block_format(lattice.type), block_format(kind)
    blocks = unpack(form, found.data)
    moved = _moved(form, blocks, wider)
    same = np.array_equal(values(wider, moved), values(form, blocks))
    return pack(wider, moved) if same else None  # a minimum may be beyond float16


def _moved(form: Format, blocks: Blocks, wider: Format) -> Blocks:
    """The same values as codes of a format with more levels."""
    if form.has_minimum:
        return blocks
    if wider.has_minimum:
        with np.errstate(over="ignore"):
            minimum = (blocks.scale * np.float16(form.levels[0])).astype(np.float16)
        return Blocks(blocks.codes, blocks.scale, minimum)
    levels = np.array(form.levels, np.int16)[blocks.codes]
    return Blocks((levels - wider.levels[0]).astype(np.uint8), blocks.scale)


@dataclass(slots=True)
class Exact:
    """An encoder that packs what lies on a lattice, and leaves all else to `inner`."""

    inner: Encode
    lattices: Mapping[str, OnLattice]

    def __call__(self, rows: Rows) -> np.ndarray:
        """(rows, row_bytes) uint8."""
        lattice = self.lattices.get(rows.tensor)
        found = None if lattice is None else pack_exactly(rows.weights, rows.type, lattice)
        return self.inner(rows) if found is None else found


def with_lattices(errors: Errors, lattices: Mapping[str, OnLattice]) -> Errors:
    """The same rounding errors, but those of exact packing where a format holds the tensor."""

    def found(tensor: str, weights: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        lattice = lattices.get(tensor)
        packed = None if lattice is None else _lattice_values(weights, lattice)
        holders = HOLDERS[lattice.type] if lattice is not None and packed is not None else ()
        for kind, error in errors(tensor, weights):
            yield kind, packed - weights if packed is not None and kind in holders else error

    return found


def _lattice_values(weights: np.ndarray, lattice: OnLattice) -> np.ndarray | None:
    data = pack_exactly(weights, lattice.type, lattice)
    form = block_format(lattice.type)
    return None if data is None else values(form, unpack(form, data))


def held(path: Path, lattices: Mapping[str, OnLattice]) -> list[str]:
    """Tensors on a lattice whose type in a file holds it, in the file's order."""
    return [
        tensor.name
        for tensor in read_header(path).tensors
        if tensor.name in lattices and tensor.type.name in HOLDERS[lattices[tensor.name].type]
    ]


def no_larger(path: Path, lattices: Mapping[str, OnLattice]) -> dict[str, str]:
    """Tensors of a file whose type does not hold their lattice, though the lattice's own is no larger."""
    found = {}
    for tensor in read_header(path).tensors:
        lattice = lattices.get(tensor.name)
        if lattice is None or tensor.type.name in HOLDERS[lattice.type]:
            continue
        if TensorType[lattice.type].bits_per_weight <= tensor.type.bits_per_weight:
            found[tensor.name] = lattice.type
    return found


def repack(source: MixedSource, path: Path, lattices: Mapping[str, OnLattice]) -> list[str]:
    """Pack tensors of a file that llama.cpp rounded, in place and in their types, as `held` lists them.

    Returns those that are exact now; the file's size and its header stay what they were.
    """
    wanted, done = set(held(path, lattices)), []
    places = {tensor.name: tensor for tensor in read_header(path).tensors}
    with path.open("r+b") as file:
        for tensor in source.quantizable:
            if tensor.name not in wanted:
                continue
            place, position = places[tensor.name], places[tensor.name].offset
            for rows in stored_matrices(source, tensor).blocks():
                data = pack_exactly(rows.weights, place.type.name, lattices[tensor.name])
                if data is None:
                    break
                file.seek(position)
                file.write(np.ascontiguousarray(data).data.cast("B"))
                position += data.size
            if position == place.offset + place.size_bytes:
                done.append(tensor.name)
    return done
