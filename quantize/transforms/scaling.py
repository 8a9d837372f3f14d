"""Scales of a product's input channels that lower what rounding its weights costs: a grid of exponents.

A channel's weights are multiplied by s, its activations divided by it. With m the mean square of a channel's
activations and w that of its weights, s = m^alpha * w^-beta; alpha is AWQ's (Lin et al., 2023), beta evens
the weights of a block out, which its scale then fits better. Arrays in, factors out; knows no models.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

#: (weights (rows, n), E[x x^T] (n, n)) -> the rounded weights, float32.
Round = Callable[[np.ndarray, np.ndarray], np.ndarray]
EXPONENTS = (
    (0.0, 0.0), (0.0, 0.25), (0.0, 0.5), (0.0625, 0.25), (0.125, 0.0), (0.125, 0.25), (0.125, 0.5),
    (0.1875, 0.25), (0.25, 0.25),
)  # fmt: skip
#: Factors further apart than this serve single channels at the expense of all others.
MAX_RATIO = 64.0
#: A ratio above this is chance, or no gain worth a change.
WORTHWHILE = 0.999
#: Rows of a matrix that are rounded to compare exponents.
SAMPLED_ROWS = 128


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """The best factors (n,) and `ratio`: loss with them / loss without, by what they were searched with."""

    factors: np.ndarray
    alpha: float
    beta: float
    ratio: float


def search(
    readers: Sequence[np.ndarray],
    hessian: np.ndarray,
    rounded: Round,
    *,
    shared: np.ndarray | None = None,
    exponents: Sequence[tuple[float, float]] = EXPONENTS,
) -> Found:
    """The exponents whose factors make trace(D H D^T) least, as a mean over the readers of its ratio.

    `readers`: all matrices (rows, n) that read the input; `hessian` (n, n) its E[x x^T]. `shared` (n,):
    channels with the same number get one factor. The exponents 0, 0 change nothing and come first, so the
    ratio is never above 1.
    """
    readers = [sampled(weights) for weights in readers]
    base = np.array([loss(weights, hessian, rounded) for weights in readers])
    best = Found(np.ones(len(hessian), np.float32), 0.0, 0.0, 1.0)
    squares = _means(np.diagonal(hessian).astype(np.float64), shared)
    columns = _means(np.mean([_column_squares(weights) for weights in readers], 0), shared)
    for alpha, beta in exponents:
        if (alpha, beta) == (0.0, 0.0) or not base.all():
            continue
        factors = balanced(squares, columns, alpha, beta)
        losses = np.array([loss(weights, hessian, rounded, factors) for weights in readers])
        ratio = float((losses / base).mean())
        if ratio < min(best.ratio, WORTHWHILE):
            best = Found(factors, alpha, beta, ratio)
    return best


def balanced(squares: np.ndarray, columns: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """squares^alpha * columns^-beta with a geometric mean of 1, (n,) float32.

    Channels that are never driven, or never weighed, count as the least that are.
    """
    logs = alpha * _log(squares) - beta * _log(columns)
    half = np.log(MAX_RATIO) / 2
    logs = np.clip(logs - np.median(logs), -half, half)
    return np.exp(logs - logs.mean()).astype(np.float32)


def _column_squares(weights: np.ndarray) -> np.ndarray:
    """Mean squares of columns (n,), with a mean of 1."""
    squares = np.square(weights, dtype=np.float64).mean(0)
    return squares / max(squares.mean(), 1e-30)


def _log(values: np.ndarray) -> np.ndarray:
    alive = values[values > 0]
    least = max(float(alive.min()), 1e-9 * float(alive.max())) if alive.size else 1.0
    return np.log(np.maximum(values, least))


def loss(
    weights: np.ndarray,
    hessian: np.ndarray,
    rounded: Round,
    factors: np.ndarray | None = None,
    *,
    weighed: np.ndarray | None = None,
) -> float:
    """trace(D H D^T) of weights that are rounded after multiplying their columns by the factors.

    `weighed`: what errors cost instead, while the rounding knows of H alone.
    """
    if factors is None:
        error = rounded(weights, hessian) - weights
    else:
        scaled = weights * factors
        error = (rounded(scaled, hessian / np.outer(factors, factors)) - scaled) / factors
    return float(np.vdot(error.astype(np.float32) @ (hessian if weighed is None else weighed), error))


def sampled(weights: np.ndarray, rows: int = SAMPLED_ROWS) -> np.ndarray:
    """At most so many rows, evenly spread."""
    if len(weights) <= rows:
        return weights
    return np.ascontiguousarray(weights[np.arange(rows) * len(weights) // rows])


def _means(values: np.ndarray, shared: np.ndarray | None) -> np.ndarray:
    """Each channel's mean over those that it shares its factor with."""
    if shared is None:
        return values
    return (np.bincount(shared, values) / np.bincount(shared))[shared]
