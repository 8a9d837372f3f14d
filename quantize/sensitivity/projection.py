"""Rounding errors of one tensor in many types, and their inner products with gradients.

Owns the checks of what a rounding gave back, and which rows stand for a large matrix. Knows no layers and no
texts.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from quantize.errors import QuantizeError

#: (tensor name, its weights (rows, row length) float32) -> (type name, rounded minus true) of all candidates.
#: It may get some rows of a tensor at a time: every type rounds each row by itself.
Errors = Callable[[str, np.ndarray], Iterable[tuple[str, np.ndarray]]]

GRADIENT_BYTES = 16 * 2**20  # of per-sample gradients held at once; more than the caches hold is slower

#: Rows of a layer's matrix that are rounded in every type, and of these as many as are weighed by the full
#: Hessian of inputs this wide, but no fewer than the last: all rows of a model of 135M, a quarter of an 8B's.
SAMPLED_ROWS, TRACED_WEIGHTS, LEAST_TRACED = 2048, 2**22, 512


class BadRounding(QuantizeError):
    """A rounding that gave back something else than an error of every weight."""

    def __init__(self, name: str, kind: str, problem: str) -> None:
        super().__init__(f"rounding {name} to {kind} gave {problem}; leave the type out and report this")


@dataclass(frozen=True, slots=True)
class RowSample:
    """Some rows of a matrix, `index`, that stand for all of it: a row's errors are multiplied by its `scale`,
    one over the root of its chance to be here.

    So sums over rows of anything quadratic have the right mean. What errors of different rows, or tensors,
    have to do with each other is mostly the sample's own chance: about `share` of it is left.
    """

    index: np.ndarray
    scale: np.ndarray
    share: float

    @classmethod
    def spaced(cls, n_rows: int) -> "RowSample | None":
        """SAMPLED_ROWS, evenly spaced; None for a matrix that has no more."""
        if n_rows <= SAMPLED_ROWS:
            return None
        index = _spaced(n_rows, SAMPLED_ROWS)
        share = len(index) / n_rows
        return cls(index, np.full(len(index), share**-0.5, np.float32), share)

    @classmethod
    def drawn(cls, chances: np.ndarray, generator: np.random.Generator) -> "RowSample | None":
        """Each row by its own chance; None where all are sure. Those that matter should be: of what they have
        to do with other tensors nothing counts as lost."""
        if (chances >= 1).all():
            return None
        index = np.flatnonzero(generator.random(len(chances)) < chances)
        return cls(index, (1 / np.sqrt(np.minimum(chances[index], 1))).astype(np.float32), 1.0)


@dataclass(frozen=True, slots=True)
class RoundingErrors:
    """`values` (types, rows, row length), float32 or bfloat16, of some rows of one tensor.

    `sample` tells which of the rows asked about these are, where they stand for all of them.
    """

    types: tuple[str, ...]
    values: Tensor
    sample: RowSample | None = None

    @classmethod
    def make(
        cls,
        errors: Errors,
        name: str,
        weights: np.ndarray,
        *,
        sample: RowSample | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "RoundingErrors":
        """Ask for all candidates once; there may be none. Raises BadRounding."""
        if sample is not None:
            weights = weights[sample.index]
        found = dict(_checked(errors, name, weights, dtype))
        values = torch.stack(list(found.values())) if found else torch.zeros((0, *weights.shape), dtype=dtype)
        if sample is not None:
            values *= torch.from_numpy(sample.scale)[:, None].to(dtype)
        return cls(tuple(found), values, sample)

    def to(self, device: str | torch.device) -> "RoundingErrors":
        """The same on a device."""
        return replace(self, values=self.values.to(device))

    def of_rows(self, numbers: Tensor) -> Tensor:
        """Of numbers by row, in the last axis, those of the rows that are here."""
        return numbers if self.sample is None else numbers[..., torch.from_numpy(self.sample.index)]

    def project(self, delta: Tensor, inputs: Tensor) -> Tensor:
        """<gradient of sample s, error of type k>, (samples, types) in the inputs' dtype.

        The gradient is delta^T inputs: `delta` (samples, tokens, rows), `inputs` (samples, tokens, row
        length). It is made a few rows at a time and thrown away.
        """
        delta = self.of_rows(delta)
        n_samples, n_rows, width = len(delta), *self.values.shape[1:]
        result = inputs.new_zeros(n_samples, len(self.types))
        step = max(1, GRADIENT_BYTES // (4 * n_samples * width))
        for start in range(0, n_rows, step):
            gradient = torch.bmm(delta[:, :, start : start + step].transpose(1, 2), inputs)
            rows = self.values[:, start : start + step].to(inputs).flatten(1)
            result += gradient.flatten(1) @ rows.T
        return result

    def project_rows(self, delta: Tensor, index: Tensor) -> Tensor:
        """The same for a lookup: sum over tokens of <delta, error of row `index`>, (samples, types).

        `delta` (samples, tokens, row length), `index` (samples, tokens).
        """
        parts = [torch.einsum("std,std->s", rows[index].to(delta), delta) for rows in self.values]
        return torch.stack(parts, 1) if parts else delta.new_zeros(len(delta), 0)

    def traced(self) -> np.ndarray:
        """Places of the rows that stand for these where a wide Hessian weighs them, evenly spaced."""
        n_rows, width = self.values.shape[1:]
        return _spaced(n_rows, max(LEAST_TRACED, TRACED_WEIGHTS // width))

    def squares(self, hessian: Tensor | None, rows: np.ndarray | None = None) -> Tensor:
        """(types, rows) float64: d H d^T of every row's error d; its plain square where there is no Hessian.

        H = E[x x^T], so this is the mean square that rounding adds to the row's output. `rows`: of these.
        """
        every = self.values if rows is None else self.values[:, torch.from_numpy(rows)]
        result = torch.zeros(every.shape[:2], dtype=torch.float64)
        for number, values in enumerate(every):
            error = values.to(torch.float32 if hessian is None else hessian.dtype)
            weighted = error if hessian is None else error @ hessian
            result[number] = (weighted * error).sum(1).double().cpu()
        return result


def _spaced(n: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(np.int64))


def _checked(
    errors: Errors, name: str, weights: np.ndarray, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for kind, error in errors(name, weights):
        if error.shape != weights.shape:
            raise BadRounding(name, kind, f"the shape {error.shape} for {weights.shape}")
        if not np.isfinite(error).all():
            raise BadRounding(name, kind, "numbers that are not finite")
        yield kind, torch.from_numpy(np.ascontiguousarray(error)).to(dtype)
