"""What meets each weight: H = E[x x^T] of the inputs x of every product, collected layer by layer and stored.

Products that read the same input share one: q, k and v; gate and up. Of the embedding only the use as a tied
head is a product. Owns the files; the pass over the texts is `quantize.network.stream`'s.

A matrix is stored as its diagonal in float32 and, once for both sides, its correlations in float16: a quarter
of the bytes, which for a model of 8B are 8 GB instead of 33, for an error that is far below the shrinkage of
what uses it (`quantize.rounding.curvature`).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from models.atomic import whole
from quantize.errors import QuantizeError
from quantize.network.shape import layer_of

MEAN = ":mean"  # behind the name that means are stored under
DIAGONAL = ":diagonal"
STORED = "float16 correlations"  # files that hold matrices in another way count as missing
#: Parts whose input another part reads too, and under which part it is stored.
SHARED = {"attn_k": "attn_q", "attn_v": "attn_q", "ffn_gate": "ffn_up"}


class NoHessian(QuantizeError):
    """A tensor whose inputs were not collected."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(f"{folder} holds no Hessian for {name}; collect it over the calibration text first")


def input_of(name: str) -> str:
    """The tensor under whose name the input that this one reads is stored."""
    head, _, kind = name.rpartition(".")
    layer, _, part = head.rpartition(".")
    return f"{layer}.{SHARED[part]}.{kind}" if part in SHARED else name


class InputMoments(Protocol):
    """E[x x^T] and E[x] of what products read, wherever they come from; `Hessians` are some in a folder."""

    def read(self, name: str) -> np.ndarray:
        """(n, n) float32 of the inputs that tensor `name` is multiplied with; raises NoHessian."""
        ...

    def mean(self, name: str) -> np.ndarray:
        """(n,) float32: E[x] of the same inputs; raises NoHessian."""
        ...

    def count(self, name: str) -> int:
        """Tokens that both are means over; raises NoHessian."""
        ...


@dataclass(slots=True)
class Moments:
    """Sums of x x^T, and of x, by the names of `input_of`; `tap` is what layers call."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    totals: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def tap(self, name: str, inputs: Tensor, _: Tensor) -> None:
        """Add one product's inputs, (batch, tokens, in)."""
        if input_of(name) != name:
            return
        rows = inputs.detach().flatten(0, -2).to(torch.promote_types(inputs.dtype, torch.float32))
        if name not in self.sums:
            self.sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
            self.totals[name] = rows.new_zeros(rows.shape[1])
            self.counts[name] = 0
        self.sums[name].addmm_(rows.T, rows)
        self.totals[name] += rows.sum(0)
        self.counts[name] += len(rows)


@dataclass(frozen=True, slots=True)
class Hessians:
    """Hessians in a folder, a file a layer and one for the head; files of another `key` count as missing."""

    folder: Path
    key: str

    def has(self, layer: int | None) -> bool:
        """Whether a layer's (None: the head's) are there, from the same model and texts."""
        try:
            with safe_open(self._path(layer), "numpy") as file:
                found = file.metadata() or {}
                return (found.get("key"), found.get("stored")) == (self.key, STORED)
        except (FileNotFoundError, SafetensorError):
            return False

    def drop_last(self) -> None:
        """So that none counts as there, whichever are removed next."""
        self._path(None).unlink(missing_ok=True)

    def write(self, layer: int | None, moments: Moments) -> None:
        """Store a layer's means; the file appears whole or not at all.

        The head's of another key goes: it is written last, so with it all layers' count as there.
        """
        if not self.has(None):
            self.drop_last()
        tensors: dict[str, np.ndarray] = {}
        for name, count in moments.counts.items():
            matrix = (moments.sums[name] / count).float().cpu().numpy()
            tensors[name + DIAGONAL], tensors[name] = packed(matrix)
            tensors[name + MEAN] = (moments.totals[name] / count).float().cpu().numpy()
        counts = {name: str(count) for name, count in moments.counts.items()}
        with whole(self._path(layer)) as partial:
            save_file(tensors, partial, metadata={"key": self.key, "stored": STORED, **counts})

    def read(self, name: str) -> np.ndarray:
        """(n, n) float32 of the inputs that tensor `name` is multiplied with; raises NoHessian."""
        stored = input_of(name)
        return unpacked(self._tensor(name, stored + DIAGONAL), self._tensor(name, stored))

    def mean(self, name: str) -> np.ndarray:
        """(n,) float32: E[x] of the same inputs; raises NoHessian."""
        return self._tensor(name, input_of(name) + MEAN)

    def _tensor(self, name: str, stored: str) -> np.ndarray:
        layer = layer_of(name)
        if not self.has(layer):
            raise NoHessian(name, self.folder)
        with safe_open(self._path(layer), "numpy") as file:
            if stored not in file.keys():  # noqa: SIM118 (no dict)
                raise NoHessian(name, self.folder)
            return file.get_tensor(stored)

    def count(self, name: str) -> int:
        """Tokens that a tensor's Hessian is the mean over; raises NoHessian."""
        layer = layer_of(name)
        if not self.has(layer):
            raise NoHessian(name, self.folder)
        with safe_open(self._path(layer), "numpy") as file:
            count = file.metadata().get(input_of(name))
        if count is None:
            raise NoHessian(name, self.folder)
        return int(count)

    def _path(self, layer: int | None) -> Path:
        part = "head" if layer is None else f"{layer:03d}"
        return self.folder / f"hessian-{part}.safetensors"


def stored_bytes(widths: Iterable[tuple[str, int]]) -> int:
    """What a model's Hessians take on disk, by tensor and the width of its input; the head's left out."""
    read = [width for name, width in widths if layer_of(name) is not None and input_of(name) == name]
    return sum(2 * (width * (width - 1) // 2) + 8 * width for width in read)


def packed(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The (n,) float32 diagonal of a symmetric (n, n) matrix and its (n (n - 1) / 2,) float16 correlations,
    those right of the diagonal, row by row."""
    n, diagonal = len(matrix), np.diagonal(matrix).astype(np.float32)
    inverse = _inverse_root(diagonal)
    correlations, at = np.empty(n * (n - 1) // 2, np.float16), 0
    for row in range(n - 1):
        right = slice(row + 1, n)
        # one after the other: of two inputs that are hardly ever there the product of both is infinite
        correlations[at : at + n - 1 - row] = matrix[row, right] * inverse[row] * inverse[right]
        at += n - 1 - row
    return diagonal, correlations


def unpacked(diagonal: np.ndarray, correlations: np.ndarray) -> np.ndarray:
    """The (n, n) float32 matrix of both."""
    n, root, at = len(diagonal), np.sqrt(diagonal), 0
    matrix = np.diag(diagonal)
    for row in range(n - 1):
        right = slice(row + 1, n)
        matrix[row, right] = correlations[at : at + n - 1 - row] * (root[row] * root[right])
        matrix[right, row] = matrix[row, right]
        at += n - 1 - row
    return matrix


def _inverse_root(diagonal: np.ndarray) -> np.ndarray:
    """Zero where nothing ever came in."""
    root = np.sqrt(diagonal)
    return np.divide(1, root, out=np.zeros_like(root), where=root > 0)
