"""The types that a mix is made of, and what rounding to nearest in each of them takes from a tensor.

Owns the list and the importance that goes with each tensor; which type wins is decided elsewhere.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from quantize.gguf_files.tensor_rules import fitting_types
from quantize.gguf_files.types import dequantize_rows, quantize_rows

#: Largest first. Each is there because some model's best mix has it; what lies above another in bytes and in
#: divergence is never chosen.
TYPES = (
    "Q8_0", "Q6_K", "Q5_1", "Q5_K", "Q5_0", "Q4_1", "Q4_K", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K", "IQ3_S",
    "IQ3_XXS", "Q2_K",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Candidates:
    """`means`: tensor -> (n_matrices * n,) mean squared inputs, as an importance matrix has them."""

    means: Mapping[str, np.ndarray]
    types: tuple[str, ...] = TYPES

    def importance(self, tensor: str, n: int, matrix: int = 0) -> np.ndarray | None:
        """(n,) of one matrix of a tensor; None where the texts never reached it."""
        values = self.means.get(tensor)
        return None if values is None else values.reshape(-1, n)[matrix]

    def errors(self, tensor: str, weights: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """(type, rounded - true) of (rows, n) float32 weights, for every type that the rows fit."""
        n = weights.shape[1]
        importance = self.importance(tensor, n)
        for kind in fitting_types(n, self.types):
            data = quantize_rows(kind, weights, importance)
            yield kind, dequantize_rows(kind, data, n) - weights
