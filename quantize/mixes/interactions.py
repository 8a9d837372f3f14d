"""How rounding errors of different tensors add up or cancel, and how far samples of that can be believed.

The divergence of a mix is about mean_s (sum_l a[s, l, k_l])^2 / (2 n_tokens): a sample's loss moves by the
sum of what each tensor's rounding error adds to it. The squares are each tensor's own cost; the products of
two tensors are what this file is about. numpy only.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Interactions:
    """`projections` (samples, tensors, choices): rounding error of a tensor onto a sample's loss gradient.

    In nats, the choices in the order in which each tensor lists them; what lies beyond a tensor's last choice
    is not read. `n_tokens` is what one sample has on average. `shrinkage` multiplies the products of two
    tensors, 0 (they are ignored) to 1 (they are taken as measured); None: estimated from the samples.
    `shares` (tensors,): of a tensor's rows those that stand for all; its products are believed by the root.
    """

    projections: np.ndarray
    n_tokens: float
    shrinkage: float | None = None
    shares: np.ndarray | None = None


def vectors(interactions: Interactions, costs: np.ndarray) -> np.ndarray:
    """(tensors, choices, samples) v with sum_{l != m} v_l . v_m = what the products add to the divergence.

    `costs` (tensors, choices), inf where there is no choice, is what each tensor costs by itself. Where it is
    below the samples' own figure the vector is shortened to it, so that no mix is predicted below zero.
    """
    scale = 1 / np.sqrt(2 * interactions.n_tokens * len(interactions.projections))
    taken = np.isfinite(costs)
    found = np.where(taken[None], interactions.projections, 0.0).transpose(1, 2, 0) * scale
    own = np.einsum("lks,lks->lk", found, found)
    longest = np.sqrt(np.divide(costs, own, out=np.ones_like(own), where=taken & (own > 0)))
    believed = np.ones(len(found)) if interactions.shares is None else np.sqrt(interactions.shares)
    return found * (np.minimum(longest, 1) * believed[:, None])[:, :, None]


def estimated_shrinkage(mix: np.ndarray) -> float:
    """The share of the products of a mix's vectors (tensors, samples) that is no sampling noise, 0..1.

    With c_lm = mean_s w_s, w_s = a_sl a_sm, it is 1 - sum Var(c_lm) / sum c_lm^2 over l != m, the variance of
    a mean being that of its terms over the samples less one: the intensity that minimises the expected
    squared error of a covariance drawn towards its diagonal (Ledoit and Wolf 2003; Schaefer and Strimmer
    2005). A sum over all pairs of tensors is known well, where each pair alone is not.
    """
    n_samples = mix.shape[1]
    if n_samples < 2 or len(mix) < 2:
        return 0.0
    between = mix.T @ mix  # (samples, samples): sum_lm (sum_s w_s)^2 = sum_st between_st^2, l = m included
    squares = mix**2
    signal = (between**2).sum() - (squares.sum(1) ** 2).sum()
    terms = (np.diag(between) ** 2).sum() - (squares**2).sum()
    if signal <= 0:
        return 0.0
    noise = (n_samples * terms - signal) / (n_samples - 1)
    return float(np.clip(1 - noise / signal, 0, 1))
