"""Factors of lower rank: the best approximation of B A by its singular values. Pure.

Eckart and Young (1936): no matrix of rank r is closer to B A than its r largest singular components; what is
lost is the root of the sum of the squares of the others.
"""

from dataclasses import dataclass

import numpy as np

from quantize.errors import QuantizeError


class BadRank(QuantizeError):
    """A rank or a share of energy that cannot be meant."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The singular values of one product, largest first, with its orthogonal factors."""

    left: np.ndarray  # (out, r)
    values: np.ndarray  # (r,)
    right: np.ndarray  # (r, in)

    @classmethod
    def of(cls, b: np.ndarray, a: np.ndarray) -> "Spectrum":
        """Of b @ a, (out, r) @ (r, in), without forming it: the work is that of two thin QRs."""
        q_left, r_left = np.linalg.qr(b.astype(np.float64))
        q_right, r_right = np.linalg.qr(a.astype(np.float64).T)
        u, values, v = np.linalg.svd(r_left @ r_right.T)
        return cls(q_left @ u, values, v @ q_right.T)

    def rank_for(self, energy: float) -> int:
        """The least rank that keeps this share of the sum of squares; at least 1."""
        if not 0 < energy <= 1:
            raise BadRank(f"--energy is {energy}; give a share above 0 and up to 1, such as 0.99")
        squares = np.cumsum(self.values**2)
        if not squares[-1]:
            return 1
        # rounding must not cost a rank where all of it is asked for
        return int(np.searchsorted(squares / squares[-1], min(energy, 1 - 1e-12))) + 1

    def lost(self, rank: int) -> float:
        """Share of the sum of squares that a rank leaves out."""
        total = float((self.values**2).sum())
        return float((self.values[rank:] ** 2).sum()) / total if total else 0.0

    def factors(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """(b, a) of that rank, float32, the singular values shared evenly between the two."""
        root = np.sqrt(self.values[:rank])
        b, a = self.left[:, :rank] * root, root[:, None] * self.right[:rank]
        return b.astype(np.float32), a.astype(np.float32)
