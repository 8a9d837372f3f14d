"""Tensors that were quantized before, as a record and as a section of the card."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

#: Names that are told one by one.
TOLD = 40


@dataclass(frozen=True, slots=True)
class LatticeReport:
    """`types`: tensor -> format whose lattice it lies on; `inexact`: those whose scales are no float16
    numbers, with the largest change in steps; `packed`: file -> tensors that it holds on their lattice.
    """

    n_tensors: int
    types: Mapping[str, str]
    inexact: Mapping[str, float]
    packed: Mapping[str, Sequence[str]]


def sections(report: LatticeReport | None) -> Iterable[str]:
    """Paragraphs of markdown; none for ordinary weights."""
    if report is None or not report.types:
        return
    yield "## Quantized before"
    by_type: dict[str, list[str]] = {}
    for name, kind in report.types.items():
        by_type.setdefault(kind, []).append(name)
    lines = [f"- {kind}: {len(listed)} ({names_in_short(listed)})" for kind, listed in by_type.items()]
    yield (
        f"{len(report.types)} of {report.n_tensors} tensors lie on the lattice of a format, as weights do "
        "that were trained for it or taken from a quantized file. Where a file's type holds that lattice "
        "they are packed as they are, and nothing is lost."
    )
    yield "\n".join(lines)
    if report.inexact:
        worst = max(report.inexact.values())
        yield (
            f"The scales of {len(report.inexact)} of them are no float16 numbers, as all formats have: their "
            f"weights change by up to {worst:.2g} of a step ({names_in_short(list(report.inexact))})."
        )
    packed = [
        f"- {file}: {len(names)} ({names_in_short(names)})" for file, names in report.packed.items() if names
    ]
    if packed:
        yield "Packed on their lattice:"
        yield "\n".join(packed)


def names_in_short(names: Sequence[str]) -> str:
    """ "blk.0-3.attn_q.weight, token_embd.weight": layers that follow each other as a range."""
    layers: dict[str, list[int]] = {}
    for name in names:
        part, _, rest = name.partition(".")
        number, _, kind = rest.partition(".")
        is_layer = part == "blk" and number.isdigit()
        layers.setdefault(f"blk.*.{kind}" if is_layer else name, []).extend([int(number)] if is_layer else [])
    found = [
        kind.replace("*", each) if numbers else kind
        for kind, numbers in layers.items()
        for each in (_ranges(numbers) if numbers else [""])
    ]
    more = len(found) - TOLD
    return ", ".join(f"`{name}`" for name in found[:TOLD]) + (f" and {more} more" if more > 0 else "")


def _ranges(numbers: Sequence[int]) -> list[str]:
    """[0, 1, 2, 5] -> ["0-2", "5"]."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return [f"{first}" if first == last else f"{first}-{last}" for first, last in found]
