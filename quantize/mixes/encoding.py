"""Round the rows of a file's tensors: the best way there is for each format, or ggml's own.

Owns which Hessian and which importance go with a tensor, and keeps the factor of the last Hessian, since
neighbouring tensors share one. How rows are rounded is `quantize.rounding.matrix`'s.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from quantize.gguf_files.packing import FORMATS
from quantize.gguf_files.parts import Rows
from quantize.gguf_files.types import quantize_rows
from quantize.mixes.candidates import Candidates
from quantize.network.hessian import InputMoments, input_of
from quantize.rounding.curvature import Curvature, prepare
from quantize.rounding.matrix import Rounded, round_matrix
from quantize.steps import write_text

LEAST_GAIN = 1e-6  # of a tensor that lies on the lattice of its type already


@dataclass(frozen=True, slots=True)
class Losses:
    """trace(D H D^T) of rounded tensors beside that of ggml's rounding with the same importance.

    In files beside the rounded tensors themselves, since a run that goes on does not round them again.
    """

    folder: Path

    def add(self, tensor: str, kind: str, made: float, nearest: float, *, first: bool = True) -> None:
        """Record a matrix; a tensor of several has the sum. `first` forgets what was recorded before."""
        before = (None if first else self._read(tensor, kind)) or (0.0, 0.0)
        write_text(self._path(tensor, kind), json.dumps([before[0] + made, before[1] + nearest]))

    def gain(self, types: Mapping[str, str]) -> float | None:
        """Geometric mean over a mix's tensors of the loss against ggml's; None where only ggml rounded."""
        both = [self._read(tensor, kind) for tensor, kind in types.items()]
        logs = [math.log(max(loss[0] / loss[1], LEAST_GAIN)) for loss in both if loss and loss[1] > 0]
        return math.exp(sum(logs) / len(logs)) if logs else None

    def _read(self, tensor: str, kind: str) -> Sequence[float] | None:
        path = self._path(tensor, kind)
        return json.loads(path.read_text("utf-8")) if path.exists() else None

    def _path(self, tensor: str, kind: str) -> Path:
        return self.folder / f"{tensor}-{kind}.loss"


@dataclass(slots=True)
class Nearest:
    """ggml's rounding to nearest with importance, for any type and any block of rows."""

    candidates: Candidates

    def __call__(self, rows: Rows) -> np.ndarray:
        """(rows, row_bytes) uint8."""
        importance = self.candidates.importance(rows.tensor, rows.weights.shape[1], rows.matrix)
        return quantize_rows(rows.type, rows.weights, importance)


@dataclass(slots=True)
class Best:
    """Rounding with error feedback under the Hessian of what a tensor is multiplied with.

    Formats that only ggml knows how to search are rounded by it. `lookups` are tables that nothing is
    multiplied with, so they have no Hessian. Wants whole matrices.
    """

    candidates: Candidates
    hessians: InputMoments
    losses: Losses
    lookups: frozenset[str] = frozenset()
    _last: tuple[str, Curvature] | None = None

    def __call__(self, rows: Rows) -> np.ndarray:
        """(rows, row_bytes) uint8."""
        if rows.type not in FORMATS:
            return Nearest(self.candidates)(rows)
        rounded = self.rounded(rows)
        first = rows.matrix == 0
        self.losses.add(rows.tensor, rows.type, rounded.loss, rounded.baseline_loss, first=first)
        return rounded.data

    def rounded(self, rows: Rows) -> Rounded:
        """With its losses; of a type in FORMATS."""
        return round_matrix(
            rows.weights,
            rows.type,
            hessian=self._curvature(rows.tensor),
            importance=self.candidates.importance(rows.tensor, rows.weights.shape[1], rows.matrix),
        )

    def _curvature(self, tensor: str) -> Curvature | None:
        if tensor in self.lookups:
            return None
        name = input_of(tensor)
        if self._last is None or self._last[0] != name:
            self._last = None  # two large ones are never there at once
            hessian, n_tokens = self.hessians.read(tensor), self.hessians.count(tensor)
            self._last = name, prepare(hessian, n_tokens=n_tokens)
        return self._last[1]


def one_thread() -> None:
    """For processes that round side by side: two threads each would wait for each other."""
    torch.set_num_threads(1)
