"""What makes each tensor hard to round: heavy tails, columns that outweigh the rest, inputs that do.

Streams rows; one block of them is in memory at a time. Owns the figures of a tensor; which are worth showing
is `quantize.structure.tensor_report`'s.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from models.gguf import TensorInfo
from models.tensor_types import TensorType
from quantize.gguf_files.mixed_file import MixedSource
from quantize.gguf_files.parts import StoredMatrices
from quantize.gguf_files.tensor_rules import fitting_types
from quantize.gguf_files.types import dequantize_rows, quantize_rows

#: Of columns, the largest; at least one.
TOP_SHARE = 0.01
#: What tensors are rounded to, to see how hard that is; the first whose blocks fill the rows.
PROBES = ("Q4_0",)

Progress = Callable[[str, int, int], None]  # tensor, weights done, in all


@dataclass(frozen=True, slots=True)
class TensorFigures:
    """One tensor. Shares and relative errors are of 0..1; None: not known, or nothing fits the rows.

    `kurtosis`: excess, 0 of a Gaussian. `max_over_rms`: of the weights. `weight_share`, `input_share`: how
    much of the energy of weights, of mean squared inputs, the largest 1 % of columns hold. `rounded`: the
    type that `error` and `weighted_error` are of: squared rounding errors over squared weights, the second
    with every column weighed by its inputs. `sensitivity`: predicted nats a token that this type costs.
    """

    name: str
    shape: tuple[int, ...]
    rms: float
    kurtosis: float
    max_over_rms: float
    weight_share: float
    input_share: float | None
    rounded: str | None
    error: float | None
    weighted_error: float | None
    sensitivity: float | None = None


@dataclass(slots=True)
class Sums:
    """What rows add up to, in float64; `importance` (n,) weighs columns, None: all alike."""

    n_columns: int
    probe: str | None
    importance: np.ndarray | None
    powers: np.ndarray = field(default_factory=lambda: np.zeros(5))  # of the weights: 0 to 4
    largest: float = 0.0
    columns: np.ndarray = field(default_factory=lambda: np.zeros(0))  # energy of each
    errors: np.ndarray = field(default_factory=lambda: np.zeros(0))  # squared, of each

    def __post_init__(self) -> None:
        self.columns, self.errors = np.zeros(self.n_columns), np.zeros(self.n_columns)

    def add(self, weights: np.ndarray) -> None:
        """(rows, n) float32."""
        wide = weights.astype(np.float64)
        squares = wide * wide
        self.powers += (
            wide.size,
            wide.sum(),
            squares.sum(),
            (squares * wide).sum(),
            (squares * squares).sum(),
        )
        self.largest = max(self.largest, float(np.abs(weights).max()))
        self.columns += squares.sum(0)
        if self.probe is not None:
            data = quantize_rows(self.probe, weights, self.importance)
            error = (dequantize_rows(self.probe, data, self.n_columns) - weights).astype(np.float64)
            self.errors += (error * error).sum(0)

    @property
    def rms(self) -> float:
        """Root of the mean square."""
        return math.sqrt(self.powers[2] / self.powers[0])

    @property
    def kurtosis(self) -> float:
        """Excess; 0 where all weights are the same."""
        mean, second, third, fourth = self.powers[1:] / self.powers[0]
        variance = second - mean**2
        if variance <= 0:
            return 0.0
        central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
        return float(central / variance**2 - 3)

    def relative_error(self, weighing: np.ndarray | None) -> float | None:
        """Squared errors over squared weights, columns weighed; None without a probe."""
        if self.probe is None:
            return None
        weights = np.ones(self.n_columns) if weighing is None else weighing.astype(np.float64)
        total = float(self.columns @ weights)
        return float(self.errors @ weights) / total if total > 0 else 0.0


def figures(
    source: MixedSource,
    means: Mapping[str, np.ndarray],
    sensitivities: Mapping[tuple[str, str], float],
    *,
    progress: Progress | None = None,
) -> list[TensorFigures]:
    """Every tensor that may be quantized, in the file's order.

    `means`: mean squared inputs by tensor, (n_matrices * n,). `sensitivities`: (tensor, type) -> nats.
    """
    total, done, found = sum(tensor.n_elements for tensor in source.quantizable), 0, []
    for tensor in source.quantizable:
        found.append(_of(source, tensor, means.get(tensor.name), sensitivities))
        done += tensor.n_elements
        if progress is not None:
            progress(tensor.name, done, total)
    return found


def _of(
    source: MixedSource,
    tensor: TensorInfo,
    inputs: np.ndarray | None,
    sensitivities: Mapping[tuple[str, str], float],
) -> TensorFigures:
    n = tensor.shape[0]
    probes = fitting_types(n, PROBES)
    probe = probes[0] if probes else None
    inputs = None if inputs is None else inputs.reshape(-1, n).mean(0)  # experts together
    sums = Sums(n, probe, None)
    stored = StoredMatrices(source.files[tensor.name], tensor, TensorType[tensor.type.name], None)
    for rows in stored.blocks():
        sums.add(rows.weights)
    largest, rms = sums.largest, sums.rms
    return TensorFigures(
        name=tensor.name,
        shape=tensor.shape,
        rms=rms,
        kurtosis=sums.kurtosis,
        max_over_rms=largest / rms if rms > 0 else 0.0,
        weight_share=top_share(sums.columns),
        input_share=None if inputs is None else top_share(inputs),
        rounded=probe,
        error=sums.relative_error(None),
        weighted_error=None if inputs is None else sums.relative_error(inputs),
        sensitivity=None if probe is None else sensitivities.get((tensor.name, probe)),
    )


def top_share(energies: np.ndarray) -> float:
    """How much of the sum the largest 1 % hold, at least one of them; 0 of nothing."""
    count = max(1, math.ceil(TOP_SHARE * len(energies)))
    total = float(np.sum(energies, dtype=np.float64))
    return float(np.sort(energies)[-count:].sum(dtype=np.float64)) / total if total > 0 else 0.0


def hardest(tensors: Iterable[TensorFigures], most: int) -> list[TensorFigures]:
    """Those that cost most when rounded: by sensitivity where all have one, else by error."""
    listed = [tensor for tensor in tensors if tensor.rounded is not None]
    if listed and all(tensor.sensitivity is not None for tensor in listed):
        return sorted(listed, key=lambda tensor: -(tensor.sensitivity or 0.0))[:most]
    return sorted(listed, key=lambda tensor: -_error(tensor))[:most]


def _error(tensor: TensorFigures) -> float:
    found = tensor.error if tensor.weighted_error is None else tensor.weighted_error
    return found or 0.0
