"""What is really inside a GGUF: tensors by type, effective bits per weight, and where the name misleads.

Reads headers; computes nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.gguf import read_header
from quantize.gguf_files.child import Fallback


@dataclass(frozen=True, slots=True)
class TypeShare:
    """Tensors of one type within a file."""

    type: str
    n_tensors: int
    n_parameters: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class TypeMap:
    """A file's contents. `bits_per_weight`: all tensor bytes over all parameters."""

    size_bytes: int
    n_parameters: int
    bits_per_weight: float
    shares: tuple[TypeShare, ...]


def read_types(path: Path) -> TypeMap:
    """The types in a GGUF, most parameters first."""
    header = read_header(path)
    totals: dict[str, list[int]] = {}
    for tensor in header.tensors:
        total = totals.setdefault(tensor.type.name, [0, 0, 0])
        total[0] += 1
        total[1] += tensor.n_elements
        total[2] += tensor.size_bytes
    shares = sorted(
        (TypeShare(name, *total) for name, total in totals.items()), key=lambda s: -s.n_parameters
    )
    return TypeMap(header.size_bytes, header.n_parameters, header.bits_per_weight, tuple(shares))


def fallback_warning(kind: str, fallbacks: Sequence[Fallback], types: TypeMap) -> str | None:
    """One sentence on tensors whose rows do not fit the type's blocks, None when all fit."""
    if not fallbacks:
        return None
    swaps: dict[tuple[str, str], int] = {}
    for fallback in fallbacks:
        swaps[fallback.wanted, fallback.given] = swaps.get((fallback.wanted, fallback.given), 0) + 1
    widths = ", ".join(str(width) for width in sorted({f.row_length for f in fallbacks}))
    told = ", ".join(f"{wanted} -> {given}: {count}" for (wanted, given), count in swaps.items())
    return (
        f"{kind}: rows of {widths} values do not fill its types' blocks, so tensors fell back ({told}); "
        f"the file has {types.bits_per_weight:.2f} bits per weight"
    )
