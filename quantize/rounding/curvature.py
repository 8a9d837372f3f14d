"""How much an error in a weight matrix costs: the Hessian H = E[x x^T] of y = W x, made fit for factoring.

An error D of a row costs D H D^T. Owns the checks of H, its damping and its factor; `Curvature` is computed
once and serves every matrix that reads the same activations, at every format. Frantar et al., GPTQ, 2022.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from quantize.errors import QuantizeError

DAMPING = 0.01
LARGEST_DAMPING = 10.0
SINGLE_PRECISION_SHRINKAGE = 0.01
SOLVED_AT_ONCE = 256  # columns
UNKNOWN_SHRINKAGE = 0.2  # where the number of tokens is not known


class BadHessian(QuantizeError):
    """A Hessian that cannot be one; says why."""


@dataclass(frozen=True, slots=True, eq=False)
class Curvature:
    """A Hessian in the forms that rounding needs, float32, (n, n) each.

    `plain` is what the loss is measured with; `damped` is what searches use, positive definite; `factor` is
    upper triangular, factor^T factor = damped^-1; `diagonal` (n,) is the damped one's.
    """

    plain: torch.Tensor
    damped: torch.Tensor
    factor: torch.Tensor
    _parts: dict[tuple[int, int], "Curvature"] = field(default_factory=dict, repr=False)

    @property
    def n(self) -> int:
        """Columns of the weight."""
        return len(self.plain)

    @property
    def diagonal(self) -> torch.Tensor:
        """What an error of one column costs by itself, (n,)."""
        return self.damped.diagonal()

    def part(self, first: int, last: int) -> "Curvature":
        """Of columns `first` to `last` alone, all others being fixed."""
        if (first, last) not in self._parts:
            local = self.damped[first:last, first:last]
            factor = inverse_factor(local.double())
            if factor is None:
                raise BadHessian(f"columns {first} to {last} of the damped Hessian are not positive definite")
            self._parts[first, last] = Curvature(local, local, factor.float())
        return self._parts[first, last]

    def loss(self, error: torch.Tensor) -> torch.Tensor:
        """D H D^T of each row, (rows,) float64, for an error (n, rows)."""
        return ((self.plain @ error) * error).sum(0, dtype=torch.float64).clamp_(min=0)


def prepare(
    hessian: np.ndarray,
    *,
    n_tokens: int | None = None,
    shrinkage: float | None = None,
    damping: float = DAMPING,
) -> Curvature:
    """Check, shrink, damp and factor a Hessian (n, n) collected from `n_tokens` activations.

    `shrinkage` of the way it is moved to its own diagonal: what few tokens say of how columns go together is
    half chance, and rounding would fit it (None: `usual_shrinkage`). `damping` times the mean of the diagonal
    is added to the diagonal, for columns that nothing drives; where the factor still does not exist, ten
    times as much is tried, up to LARGEST_DAMPING.
    """
    checked(hessian)
    if not 0 <= damping <= LARGEST_DAMPING:
        raise QuantizeError(f"damping is {damping}; give 0 to {LARGEST_DAMPING:g}, such as {DAMPING}")
    share = usual_shrinkage(len(hessian), n_tokens) if shrinkage is None else shrinkage
    if not 0 <= share <= 1:
        raise QuantizeError(f"shrinkage is {share}; give 0 (none) to 1 (only the diagonal is left)")
    # shrunk so far, the matrix is so well conditioned that float32 is exact enough, at half the work
    precision = np.float32 if share >= SINGLE_PRECISION_SHRINKAGE else np.float64
    damped = torch.from_numpy(np.array(hessian, precision))
    damped = (damped + damped.T) / 2
    plain, diagonal = damped.to(torch.float32, copy=True), damped.diagonal().clone()
    mean = float(diagonal.mean()) or 1.0
    damped.mul_(1 - share)
    while True:
        damped.diagonal().copy_(diagonal + damping * mean)
        if (factor := inverse_factor(damped)) is not None:
            return Curvature(plain, damped.float(), factor.float())
        if damping >= LARGEST_DAMPING:
            raise BadHessian("the Hessian is not positive semidefinite; collect it anew as a sum of x x^T")
        damping = max(10 * damping, 1e-4)


def usual_shrinkage(n: int, n_tokens: int | None) -> float:
    """How far a Hessian of `n` columns from so many tokens is moved to its diagonal.

    Twice the columns against the tokens is best for held-out text of the same kind (n = 576 and 1536, 2048
    and 8192 tokens), five times as much loses 2 % there and gains 7 % on other text (docs/log.md).
    """
    return UNKNOWN_SHRINKAGE if n_tokens is None else 10 * n / (10 * n + n_tokens)


def checked(hessian: np.ndarray) -> None:
    """Raise unless this is a square, finite, symmetric matrix without negative diagonal."""
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1] or not len(hessian):
        raise BadHessian(f"a Hessian is (n, n), not {hessian.shape}")
    if not np.isfinite(hessian).all():
        raise BadHessian("the Hessian holds NaN or infinity; collect it from a model that does not overflow")
    diagonal = np.diagonal(hessian)
    if (diagonal < 0).any():
        raise BadHessian(f"the Hessian has {diagonal.min():.3g} on its diagonal; squares are not negative")
    if np.abs(hessian - hessian.T).max() > 1e-3 * max(float(diagonal.max()), 1e-30):
        raise BadHessian("the Hessian is not symmetric; collect it as a sum of x x^T")


def inverse_factor(damped: torch.Tensor) -> torch.Tensor | None:
    """Upper triangular U with U^T U = damped^-1, or None where it is not positive definite.

    With the order of columns turned around, damped = L L^T gives U = L^-1, turned around again: one
    factorization and one triangular solve, instead of an inverse between two factorizations.
    """
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if failed or not bool(lower.isfinite().all()):
        return None
    factor = _inverse_of_lower(lower).flip(0, 1).contiguous()
    return factor if bool(factor.isfinite().all()) else None


def _inverse_of_lower(lower: torch.Tensor) -> torch.Tensor:
    """By halves: products of matrices, two thirds of a triangular solve's work and all at full speed."""
    n = len(lower)
    if n <= SOLVED_AT_ONCE:
        return torch.linalg.solve_triangular(lower, torch.eye(n, dtype=lower.dtype), upper=False)
    first, last = slice(0, n // 2), slice(n // 2, n)
    inverse = lower.new_zeros(n, n)
    inverse[first, first] = _inverse_of_lower(lower[first, first])
    inverse[last, last] = _inverse_of_lower(lower[last, last])
    inverse[last, first] = -inverse[last, last] @ (lower[last, first] @ inverse[first, first])
    return inverse
