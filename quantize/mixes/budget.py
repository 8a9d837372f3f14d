"""How many bytes a file may have: read from options, or as much as this machine holds; and what of it is left
for the tensors.

The promise is kept here: the file's true bytes, metadata and padding included, are never over the budget.
Knows headers and memory; chooses no types.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from engine.memory import available_memory
from models import placement
from models.footprint import Footprint, footprint, pieces_of
from models.gguf import Header, read_header
from models.placement import Bytes
from quantize.errors import QuantizeError
from quantize.gguf_files.header import padded
from quantize.gguf_files.mixed_file import ImportanceNote, MixedSource

UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([a-z]*)", re.IGNORECASE)
LEAST_SIZE = 1000  # less is a forgotten unit
MOST_BITS = 32.0

# What `lq serve` does of its own accord (server/shape.py, server/machine.py, lq.toml's defaults): a file that
# fits must be served with its context. A test compares the numbers.
MEMORY_SHARE = 0.8
CONTEXT_SHARE = 0.5
CONTEXT = 8192
UNKNOWN_CONTEXT = 4096
N_PARALLEL = 8
CACHE_BYTES = 512 << 20


class InvalidBudget(QuantizeError):
    """An option that says no size, or one that no file of this model can have."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What a file may have at most: true bytes, or bits of its tensors over its parameters.

    `label` is how it was asked for, without spaces: it goes into names of files and into the report.
    """

    label: str
    file_bytes: int | None = None
    bits_per_weight: float | None = None


#: As much as this machine can serve; `fit` says how much that is, once there is a file.
FIT = Budget("fit")


@dataclass(frozen=True, slots=True)
class Room:
    """What a budget leaves: bytes for the tensors that may be quantized, the padding after each included.

    `header_bytes` are all before the first tensor, `kept_bytes` those of tensors that stay as they are.
    """

    tensor_bytes: int
    header_bytes: int
    kept_bytes: int


def parse_sizes(text: str) -> tuple[Budget, ...]:
    """The budgets in a list such as "95MB,105 MB,1.2GiB,98000000", in order, each once."""
    found: dict[int, Budget] = {}
    for part in _parts(text, "--size", "95MB,105MB"):
        match = SIZE.fullmatch(part)
        if match is None or match[2].lower() not in UNITS:
            raise InvalidBudget(f"--size: {part!r} is no size; give one such as 95MB, 90.5MiB or 1.2GB")
        size = int(Fraction(match[1]) * UNITS[match[2].lower()])
        if size < LEAST_SIZE:
            raise InvalidBudget(
                f"--size: {part!r} is {size} bytes, less than any model; add the unit, as in {match[1]}MB"
            )
        found.setdefault(size, Budget("".join(part.split()), file_bytes=size))
    return tuple(found.values())


def parse_bits_per_weight(text: str) -> tuple[Budget, ...]:
    """The budgets in a list such as "4.5,3.8", in order, each once."""
    found: dict[float, Budget] = {}
    for part in _parts(text, "--bits-per-weight", "4.5,3.8"):
        try:
            bits = float(part)
        except ValueError:
            raise InvalidBudget(f"--bits-per-weight: {part!r} is no number; give one such as 4.5") from None
        if not 1 <= bits <= MOST_BITS:
            raise InvalidBudget(f"--bits-per-weight: {part!r} is not between 1 and {MOST_BITS:.0f}")
        found.setdefault(bits, Budget(f"{bits:g}bpw", bits_per_weight=bits))
    return tuple(found.values())


def _parts(text: str, option: str, example: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise InvalidBudget(f"{option}: {text!r} has an empty place; give a list such as {example}")
    return parts


def room(
    budget: Budget, source: MixedSource, choices: Mapping[str, Mapping[str, int]], note: ImportanceNote | None
) -> Room:
    """What is left for the tensors in `choices` (see MixedSource.choices); raises InvalidBudget.

    `note` is the one that the file will be written with: its texts are part of the header.
    """
    header = len(source.layout({}, note).header)
    kept = [tensor for tensor in source.tensors if tensor.name not in choices]
    kept_bytes = sum(padded(tensor.size_bytes, source.alignment) for tensor in kept)
    if budget.bits_per_weight is not None:
        exact = sum(tensor.size_bytes for tensor in kept)  # bits a weight leave the padding out
        left = int(budget.bits_per_weight * source.n_parameters / 8) - exact
    elif budget.file_bytes is not None:
        left = budget.file_bytes - header - kept_bytes
    else:
        raise InvalidBudget(f"budget {budget.label!r} says neither bytes nor bits")
    least = sum(min(sizes.values()) for sizes in choices.values())
    if left < least:
        raise _too_small(budget, source, header + kept_bytes + least, least + kept_bytes)
    return Room(left, header, kept_bytes)


def _too_small(budget: Budget, source: MixedSource, file_bytes: int, tensor_bytes: int) -> InvalidBudget:
    """Rounded up, so that what is named is enough."""
    megabytes = -(-file_bytes // 10**4) / 100
    bits = -(-8 * tensor_bytes * 1000 // source.n_parameters) / 1000
    return InvalidBudget(
        f"{budget.label} is too small: with the types that are allowed the smallest file has {file_bytes} "
        f"bytes ({megabytes:.2f}MB, {bits:.3f} bits per weight); give at least that, or allow smaller types"
    )


def fit(
    path: Path, *, memory: Bytes | None = None, n_ctx: int | None = None, n_parallel: int = N_PARALLEL
) -> Budget:
    """The largest file of a model that this machine can serve with its KV cache beside it.

    `memory`: what models may take (server/machine.py measures a GPU's); None: the host's share, no GPU. With
    a GPU the file is to lie there wholly; where the context alone is too much for it, the host counts.
    `n_ctx`: tokens of context that there is to be room for, in f16; None: what `lq serve` wants at least.
    What is computed in is an upper estimate (models/footprint.py). Raises InvalidBudget if nothing is left.
    """
    pieces = pieces_of(read_header(path).require("model"))
    memory = memory or Bytes(int(MEMORY_SHARE * available_memory()))
    trained = pieces[0].n_ctx_train or UNKNOWN_CONTEXT
    n_cells = n_ctx or min(trained, CONTEXT)
    size = _on_device(pieces, memory, n_cells, n_parallel) if memory.device else 0
    size = size if size > 0 else _on_host(pieces, memory, n_cells, n_parallel)
    if size <= 0:
        raise InvalidBudget(
            f"--fit: {n_cells} tokens of context and what is computed in leave no room for weights in "
            f"{memory.host / 1e6:.0f} MB of memory; free some, ask for less context, or give --size"
        )
    return Budget("fit", file_bytes=size)


def _on_host(pieces: Sequence[Header], memory: Bytes, n_cells: int, n_parallel: int) -> int:
    """The server's context takes a share of what weights leave, so it is to be that share at least."""
    empty, full = (_beside(pieces, cells, n_parallel, 0).host for cells in (0, n_cells))
    return memory.host - empty - CACHE_BYTES - int((full - empty) / CONTEXT_SHARE)


def _on_device(pieces: Sequence[Header], memory: Bytes, n_cells: int, n_parallel: int) -> int:
    """The GPU takes no more than the file has: the table of a tied head stays with the host, its copy goes.

    The host's part of the file depends on the mix and is taken to be that of the source.
    """
    layers = placement.n_layers(pieces[0])
    rest = _beside(pieces, n_cells, n_parallel, layers)
    host_share = placement.weights(pieces, layers).host / placement.weights(pieces, 0).host
    for_host = memory.host - rest.host - CACHE_BYTES
    return int(min(memory.device - rest.device, for_host / host_share if host_share else for_host))


def _beside(pieces: Sequence[Header], n_cells: int, n_parallel: int, layers: int) -> Bytes:
    """What is taken beside the weights."""
    taken: Footprint = footprint(pieces, n_cells=n_cells, n_parallel=n_parallel, gpu_layers=layers)
    borrowed = placement.weights(pieces, layers)
    return taken.place - borrowed
