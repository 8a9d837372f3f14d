"""Tensors that are hard to round, as a record and as a section of the card.

Owns the words: what counts as unusual, and the reason that is given for it.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quantize.figures import number
from quantize.structure.outliers import TensorFigures, hardest

#: Lines of the card's table.
SHOWN = 12
#: A figure counts as unusual from so many times the model's median on, a share of a sum from a half on, too.
UNUSUAL = 2.0
MOST_OF_IT = 0.5


@dataclass(frozen=True, slots=True)
class TensorReport:
    """All tensors that may be quantized, in the file's order."""

    tensors: tuple[TensorFigures, ...]

    @property
    def by_sensitivity(self) -> bool:
        """Whether it is known what each costs in nats."""
        listed = [tensor for tensor in self.tensors if tensor.rounded]
        return bool(listed) and all(tensor.sensitivity is not None for tensor in listed)


def sections(report: TensorReport | None) -> Iterable[str]:
    """Paragraphs of markdown."""
    if report is None or not report.tensors:
        return
    yield "## What is hard to quantize"
    order = "the nats that gradients predict" if report.by_sensitivity else "their relative error"
    yield (
        f"The {min(SHOWN, len(report.tensors))} hardest of {len(report.tensors)} tensors, by {order} when "
        "rounded to Q4_0 (to nearest). Errors are squared, relative to the squared weights; `weighed` counts "
        "every column by its mean squared input. Shares are of the energy in the largest 1 % of columns."
    )
    yield _table(report)
    yield f"Medians of all: {_medians(report.tensors)}. All tensors are in report.json."
    yield "![Rounding error and outliers by layer and kind](tensors.png)"


def reasons(tensor: TensorFigures, medians: "Medians") -> list[str]:
    """Why this one is hard, in words; empty where nothing is unusual about it."""
    found = []
    if tensor.input_share is not None and tensor.input_share > min(UNUSUAL * medians.input_share, MOST_OF_IT):
        found.append("few inputs outweigh the others")
    if tensor.weight_share > min(UNUSUAL * medians.weight_share, MOST_OF_IT):
        found.append("few columns of large weights")
    if tensor.kurtosis > max(1.0, UNUSUAL * medians.kurtosis):
        found.append("heavy tails")
    if tensor.max_over_rms > UNUSUAL * medians.max_over_rms:
        found.append("single large weights")
    errors = (tensor.error or 0.0, medians.error)
    if tensor.sensitivity is not None and errors[0] <= 1.1 * errors[1]:
        found.append("rounds like the others, but predictions hang on it")
    return found


@dataclass(frozen=True, slots=True)
class Medians:
    """Of a model's tensors."""

    kurtosis: float
    max_over_rms: float
    weight_share: float
    input_share: float
    error: float

    @classmethod
    def of(cls, tensors: Sequence[TensorFigures]) -> "Medians":
        """Unknown figures are left out."""

        def median(values: Iterable[float | None]) -> float:
            known = [value for value in values if value is not None]
            return statistics.median(known) if known else 0.0

        return cls(
            median(tensor.kurtosis for tensor in tensors),
            median(tensor.max_over_rms for tensor in tensors),
            median(tensor.weight_share for tensor in tensors),
            median(tensor.input_share for tensor in tensors),
            median(tensor.error for tensor in tensors),
        )


def _medians(tensors: Sequence[TensorFigures]) -> str:
    found = Medians.of(tensors)
    told = [
        f"error {_percent(found.error)}",
        f"kurtosis {found.kurtosis:.1f}",
        f"max/rms {found.max_over_rms:.1f}",
        f"weights {_percent(found.weight_share)}",
    ]
    if any(tensor.input_share is not None for tensor in tensors):
        told.append(f"inputs {_percent(found.input_share)}")
    return ", ".join(told)


def _table(report: TensorReport) -> str:
    names = ["tensor", "error", "weighed", "kurtosis", "max/rms", "weights", "inputs", "why"]
    if report.by_sensitivity:
        names.insert(1, "nats as Q4_0")
    lines = ["| " + " | ".join(cells) + " |" for cells in (names, ["---"] * len(names))]
    medians = Medians.of(report.tensors)
    for tensor in hardest(report.tensors, SHOWN):
        cells = [
            f"`{tensor.name}`",
            _percent(tensor.error),
            _percent(tensor.weighted_error),
            f"{tensor.kurtosis:.1f}",
            f"{tensor.max_over_rms:.1f}",
            _percent(tensor.weight_share),
            _percent(tensor.input_share),
            "; ".join(reasons(tensor, medians)) or "-",
        ]
        if report.by_sensitivity:
            cells.insert(1, number(tensor.sensitivity or 0.0))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{number(100 * share)} %"
