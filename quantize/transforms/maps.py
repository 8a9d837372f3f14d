"""Linear maps x' = M x of activations, and what each does to the weights and the moments around it.

Who makes x applies M to its rows, who reads x takes M back out of its columns, so that their product stays.
Pure numpy, computed in float64 and given back in the input's type; knows no models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Map(Protocol):
    """An invertible M, acting on the last axis; `backward(w) . forward(x) = w . x`."""

    def forward(self, x: np.ndarray) -> np.ndarray:
        """M x of (..., n)."""
        ...

    def backward(self, weights: np.ndarray) -> np.ndarray:
        """w M^-1 of (..., n): the columns of a matrix that reads x."""
        ...

    def squares(self, means: np.ndarray) -> np.ndarray | None:
        """E[x'^2] of E[x^2] (n,); None where that takes more than the squares."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Scale:
    """x' = x / factors, (n,), none of them 0."""

    factors: np.ndarray

    def forward(self, x: np.ndarray) -> np.ndarray:
        """Of (..., n)."""
        return (x / self.factors).astype(x.dtype)

    def backward(self, weights: np.ndarray) -> np.ndarray:
        """Of (..., n)."""
        return (weights * self.factors).astype(weights.dtype)

    def squares(self, means: np.ndarray) -> np.ndarray:
        """Of (n,)."""
        return (means / np.square(self.factors)).astype(means.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """Orthogonal matrices (blocks, w, w), one after the other along the axis; n = blocks * w."""

    blocks: np.ndarray

    def forward(self, x: np.ndarray) -> np.ndarray:
        """Of (..., n)."""
        count, width, _ = self.blocks.shape
        apart = x.reshape(*x.shape[:-1], count, width)
        turned = [apart[..., i, :].astype(np.float64) @ self.blocks[i].T for i in range(count)]
        return np.stack(turned, -2).reshape(x.shape).astype(x.dtype)

    def backward(self, weights: np.ndarray) -> np.ndarray:
        """The same: the inverse of a rotation is its transpose."""
        return self.forward(weights)

    def squares(self, means: np.ndarray) -> None:
        """Depends on how the numbers go together."""


@dataclass(frozen=True, slots=True, eq=False)
class Permutation:
    """x'_i = x_order[i]; `order` (n,) has every index once."""

    order: np.ndarray

    def forward(self, x: np.ndarray) -> np.ndarray:
        """Of (..., n)."""
        return x[..., self.order]

    def backward(self, weights: np.ndarray) -> np.ndarray:
        """The same."""
        return weights[..., self.order]

    def squares(self, means: np.ndarray) -> np.ndarray:
        """Of (n,)."""
        return means[self.order]


@dataclass(frozen=True, slots=True)
class Padding:
    """`n_zeros` more numbers, which are 0, behind the others."""

    n_zeros: int

    def forward(self, x: np.ndarray) -> np.ndarray:
        """(..., n) -> (..., n + n_zeros)."""
        return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, self.n_zeros)])

    def backward(self, weights: np.ndarray) -> np.ndarray:
        """The same: what reads zeros weighs them with 0."""
        return self.forward(weights)

    def squares(self, means: np.ndarray) -> np.ndarray:
        """(n,) -> (n + n_zeros,)."""
        return self.forward(means)


@dataclass(frozen=True, slots=True)
class Chain:
    """One map after the other."""

    maps: Sequence[Map]

    def forward(self, x: np.ndarray) -> np.ndarray:
        """All of them, the first one first."""
        for each in self.maps:
            x = each.forward(x)
        return x

    def backward(self, weights: np.ndarray) -> np.ndarray:
        """All of them, in the same order."""
        for each in self.maps:
            weights = each.backward(weights)
        return weights

    def squares(self, means: np.ndarray) -> np.ndarray | None:
        """None where one of them says so."""
        found: np.ndarray | None = means
        for each in self.maps:
            found = None if found is None else each.squares(found)
        return found


@dataclass(frozen=True, slots=True)
class Parts:
    """Maps of consecutive parts, (width, map or None) each; together they are the whole axis."""

    parts: Sequence[tuple[int, Map | None]]

    def forward(self, x: np.ndarray) -> np.ndarray:
        """Of (..., sum of the widths)."""
        found = [part if each is None else each.forward(part) for part, each in self._split(x)]
        return np.concatenate(found, -1)

    def backward(self, weights: np.ndarray) -> np.ndarray:
        """Of (..., sum of the widths)."""
        found = [part if each is None else each.backward(part) for part, each in self._split(weights)]
        return np.concatenate(found, -1)

    def squares(self, means: np.ndarray) -> np.ndarray | None:
        """None where one of them says so."""
        found = [part if each is None else each.squares(part) for part, each in self._split(means)]
        known = [part for part in found if part is not None]
        return np.concatenate(known) if len(known) == len(found) else None

    def _split(self, x: np.ndarray) -> list[tuple[np.ndarray, Map | None]]:
        widths = [width for width, _ in self.parts]
        assert sum(widths) == x.shape[-1]
        pieces = np.split(x, np.cumsum(widths)[:-1], -1)
        return list(zip(pieces, (each for _, each in self.parts), strict=True))


def rows(change: Map, weights: np.ndarray) -> np.ndarray:
    """M W of what makes x: (n, columns), or the (n,) of a bias or a norm."""
    if weights.ndim == 1:
        return change.forward(weights)
    return np.ascontiguousarray(change.forward(weights.T).T)


def moments(change: Map, hessian: np.ndarray) -> np.ndarray:
    """M H M^T: E[x' x'^T], of H = E[x x^T] (n, n)."""
    once = change.forward(hessian.astype(np.float64))
    return change.forward(once.T).T.astype(hessian.dtype)


def random_rotation(width: int, n_blocks: int, random: np.random.Generator) -> Rotation:
    """Hadamard matrices with random signs where the width is a power of two, else random orthogonal ones."""
    if width & (width - 1) == 0:
        base = np.ones((1, 1))
        while len(base) < width:
            base = np.block([[base, base], [base, -base]])
        signs = random.choice([-1.0, 1.0], (n_blocks, 1, width))
        return Rotation(base / np.sqrt(width) * signs)
    draws = random.standard_normal((n_blocks, width, width))
    found, upper = np.linalg.qr(draws)
    return Rotation(found * np.sign(np.diagonal(upper, axis1=1, axis2=2))[:, None, :])
