"""What meets each weight: H = E[x x^T] of the inputs x of every product, collected layer by layer and stored.

Products that read the same input share one: q, k and v; gate and up. Of the embedding only the use as a tied
head is a product. Owns the files; the pass over the texts is `quantize.network.stream`'s.
"""

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
                return (file.metadata() or {}).get("key") == self.key
        except (FileNotFoundError, SafetensorError):
            return False

    def write(self, layer: int | None, moments: Moments) -> None:
        """Store a layer's means; the file appears whole or not at all."""
        tensors = {
            stored: (sums / moments.counts[name]).float().cpu().numpy()
            for part, suffix in ((moments.sums, ""), (moments.totals, MEAN))
            for name, sums in part.items()
            for stored in (name + suffix,)
        }
        counts = {name: str(count) for name, count in moments.counts.items()}
        with whole(self._path(layer)) as partial:
            save_file(tensors, partial, metadata={"key": self.key, **counts})

    def read(self, name: str) -> np.ndarray:
        """(n, n) float32 of the inputs that tensor `name` is multiplied with; raises NoHessian."""
        return self._tensor(name, input_of(name))

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
