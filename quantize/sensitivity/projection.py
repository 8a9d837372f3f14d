"""Rounding errors of one tensor in many types, and their inner products with gradients.

Owns the checks of what a rounding gave back. Knows no layers and no texts.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quantize.errors import QuantizeError

#: (tensor name, its weights (rows, row length) float32) -> (type name, rounded minus true) of all candidates.
#: It may get some rows of a tensor at a time: every type rounds each row by itself.
Errors = Callable[[str, np.ndarray], Iterable[tuple[str, np.ndarray]]]

GRADIENT_BYTES = 16 * 2**20  # of per-sample gradients held at once; more than the caches hold is slower
TRACED_ROWS = 2048  # rows of a layer's matrix whose error is weighed by the full Hessian


class BadRounding(QuantizeError):
    """A rounding that gave back something else than an error of every weight."""

    def __init__(self, name: str, kind: str, problem: str) -> None:
        super().__init__(f"rounding {name} to {kind} gave {problem}; leave the type out and report this")


@dataclass(frozen=True, slots=True)
class RoundingErrors:
    """`values` (types, rows, row length), float32 or bfloat16, of some rows of one tensor."""

    types: tuple[str, ...]
    values: Tensor

    @classmethod
    def make(
        cls, errors: Errors, name: str, weights: np.ndarray, *, dtype: torch.dtype = torch.float32
    ) -> "RoundingErrors":
        """Ask for all candidates once; there may be none. Raises BadRounding."""
        found = dict(_checked(errors, name, weights, dtype))
        empty = torch.zeros((0, *weights.shape), dtype=dtype)
        return cls(tuple(found), torch.stack(list(found.values())) if found else empty)

    def to(self, device: str | torch.device) -> "RoundingErrors":
        """The same on a device."""
        return RoundingErrors(self.types, self.values.to(device))

    def rows(self, index: np.ndarray) -> "RoundingErrors":
        """Those of some rows."""
        every = len(index) == self.values.shape[1]
        return self if every else RoundingErrors(self.types, self.values[:, torch.from_numpy(index)])

    def project(self, delta: Tensor, inputs: Tensor) -> Tensor:
        """<gradient of sample s, error of type k>, (samples, types) in the inputs' dtype.

        The gradient is delta^T inputs: `delta` (samples, tokens, rows), `inputs` (samples, tokens, row
        length). It is made a few rows at a time and thrown away.
        """
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

    def squares(self, hessian: Tensor | None) -> Tensor:
        """(types, rows) float64: d H d^T of every row's error d; its plain square where there is no Hessian.

        H = E[x x^T], so this is the mean square that rounding adds to the row's output.
        """
        result = torch.zeros(self.values.shape[:2], dtype=torch.float64)
        for number, values in enumerate(self.values):
            error = values.to(torch.float32 if hessian is None else hessian.dtype)
            weighted = error if hessian is None else error @ hessian
            result[number] = (weighted * error).sum(1).double().cpu()
        return result


def traced_rows(n_rows: int) -> np.ndarray:
    """Rows that stand for all of a layer's matrix where the Hessian weighs errors, evenly spaced."""
    return np.unique(np.linspace(0, n_rows - 1, min(n_rows, TRACED_ROWS)).round().astype(np.int64))


def _checked(
    errors: Errors, name: str, weights: np.ndarray, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for kind, error in errors(name, weights):
        if error.shape != weights.shape:
            raise BadRounding(name, kind, f"the shape {error.shape} for {weights.shape}")
        if not np.isfinite(error).all():
            raise BadRounding(name, kind, "numbers that are not finite")
        yield kind, torch.from_numpy(np.ascontiguousarray(error)).to(dtype)
