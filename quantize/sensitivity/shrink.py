"""Estimates of divergence with less noise than a mean of a few hundred squares has.

A mean of S squares is off by sqrt(2 / S). But rounding errors of one tensor differ between types in size more
than in direction, so measured / expected divergence, with the expectation from second moments of inputs and
gradients, is nearly the same for all types of a tensor and alike in neighbouring layers. Each tensor's ratio
is pulled to its neighbours', each type's to its tensor's, as far as noise explains the difference (empirical
Bayes, on logarithms). Pure arithmetic.
"""

from collections.abc import Sequence

import numpy as np

from quantize.network.shape import kind_of, layer_of

NEAR_LAYERS = 2.0  # a neighbour this many layers away counts 1/e


def shrunk(names: Sequence[str], divergences: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """(tensors, types) nats a token; NaN where nothing was measured, 0 where rounding changes nothing.

    `divergences` (windows, tensors, types): one noisy measurement a window, whose mean is the truth.
    `expected` (tensors, types): what it should be in proportion to, 0 where rounding changes nothing.
    """
    counts = np.where(expected > 0, expected, np.nan)
    there = np.isfinite(counts)
    relative = divergences / counts  # (windows, tensors, types)
    with np.errstate(divide="ignore", invalid="ignore"):  # a tensor may have no type that changes it
        ratio = np.where(there, relative, 0.0).sum(2) / there.sum(1)
        level, noise = _logarithm(ratio)
        level = _to_neighbours(names, level, noise)
        result = counts * np.exp(level[:, None] + _type_effects(relative, ratio))
    return np.where(expected == 0, 0.0, result)


def _logarithm(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log of the mean over axis 0 and that log's variance, by the delta method."""
    mean = values.mean(0)
    variance = values.var(0, ddof=1) / len(values) if len(values) > 1 else np.square(mean)
    return np.log(mean), variance / np.square(mean)


def _to_neighbours(names: Sequence[str], level: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Levels of tensors of one kind, pulled to a local mean of the other layers'."""
    result = level.copy()
    usable = np.isfinite(level) & np.isfinite(noise) & (noise > 0)
    layers = np.array([-1 if (layer := layer_of(name)) is None else layer for name in names])
    for kind in sorted({kind_of(name) for name in names if layer_of(name) is not None}):
        alike = np.array([kind_of(name) == kind for name in names])
        members = np.flatnonzero(usable & alike)
        if len(members) < 3:
            continue
        distance = np.abs(layers[members][:, None] - layers[members])
        near = np.exp(-distance / NEAR_LAYERS) / noise[members]
        np.fill_diagonal(near, 0.0)
        near /= near.sum(1, keepdims=True)
        local = near @ level[members]
        local_noise = np.square(near) @ noise[members]
        spread = _spread(level[members] - local, noise[members] + local_noise)
        result[members] = _pulled(level[members], noise[members], local, spread + local_noise)
    return result


def _type_effects(relative: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """(tensors, types): log of how much more a type costs than its tensor's ratio says."""
    n = len(relative)
    mean, tensor = relative.mean(0), ratio.mean(0)[:, None]
    effect = np.log(mean) - np.log(tensor)
    differences = relative / mean - (ratio / ratio.mean(0))[:, :, None]
    noise = differences.var(0, ddof=1) / n if n > 1 else np.ones_like(effect)
    usual = np.zeros_like(effect)
    for kind in range(effect.shape[1]):  # what the type costs more in all tensors
        column, weight = effect[:, kind], 1 / (noise[:, kind] + 1e-12)
        there = np.isfinite(column)
        if there.sum() >= 3:
            usual[:, kind] = (column[there] * weight[there]).sum() / weight[there].sum()
    there = np.isfinite(effect)
    spread = _spread((effect - usual)[there], noise[there])
    return _pulled(effect, noise, usual, np.full_like(effect, spread))


def _spread(differences: np.ndarray, noise: np.ndarray) -> float:
    """The variance that noise does not explain."""
    return max(0.0, float(np.mean(np.square(differences) - noise))) if len(differences) else 0.0


def _pulled(value: np.ndarray, noise: np.ndarray, towards: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """The posterior mean of a value measured with `noise` around `towards` with variance `spread`."""
    total = spread + noise
    share = np.divide(spread, total, out=np.zeros_like(total), where=total > 0)
    return towards + share * (value - towards)
