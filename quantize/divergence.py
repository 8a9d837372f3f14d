"""Divergence of one model's predictions from another's, per token and summed up with standard errors.

Pure numbers: rows of logits in, records out. Knows no models, files or texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCK = 16  # rows handled at once: a few arrays of (16, n_vocab) float32, which caches hold best


@dataclass(frozen=True, slots=True)
class TokenScores:
    """One value per scored token."""

    kl: np.ndarray  # KL(reference || candidate), nats
    nll_reference: np.ndarray  # -log p of the token that stands there
    nll_candidate: np.ndarray
    same_top: np.ndarray  # bool: both models' likeliest token is the same

    @property
    def delta_p(self) -> np.ndarray:
        """Change of the probability of the token that stands there."""
        return np.exp(-self.nll_candidate) - np.exp(-self.nll_reference)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its standard error, clustered by conversation; None with fewer than two conversations."""

    mean: float
    standard_error: float | None


@dataclass(frozen=True, slots=True)
class Divergence:
    """What a report says of one file on one set of texts."""

    n_tokens: int
    n_sequences: int
    kl: Estimate
    kl_median: float
    kl_90: float
    kl_99: float
    kl_999: float
    kl_max: float
    same_top: Estimate  # share, 0..1
    delta_p_rms: float  # 0..1
    perplexity_reference: float
    perplexity: float
    perplexity_ratio: Estimate


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural log-probabilities of (tokens, vocab) logits, float32; the normaliser is summed in float64."""
    shifted = np.subtract(logits, logits.max(axis=1, keepdims=True), dtype=np.float32)
    total = np.exp(shifted).sum(axis=1, dtype=np.float64, keepdims=True)
    shifted -= np.log(total).astype(np.float32)
    return shifted


def score(reference: np.ndarray, candidate: np.ndarray, targets: np.ndarray) -> TokenScores:
    """Compare log-probabilities `reference` with logits `candidate`, both (tokens, vocab).

    `targets`: (tokens,) ids of the tokens that stand there.
    """
    parts = [
        _score_block(reference[i : i + BLOCK], candidate[i : i + BLOCK], targets[i : i + BLOCK])
        for i in range(0, len(targets), BLOCK)
    ]
    return join(parts)


def _score_block(reference: np.ndarray, candidate: np.ndarray, targets: np.ndarray) -> TokenScores:
    predicted = log_softmax(candidate)
    rows = np.arange(len(targets))
    weighted = np.exp(reference)
    weighted *= reference - predicted
    kl = weighted.sum(axis=1, dtype=np.float64)
    return TokenScores(
        kl=kl,
        nll_reference=-reference[rows, targets].astype(np.float64),
        nll_candidate=-predicted[rows, targets].astype(np.float64),
        same_top=reference.argmax(axis=1) == predicted.argmax(axis=1),
    )


def join(parts: Sequence[TokenScores]) -> TokenScores:
    """One record of many."""
    return TokenScores(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("kl", "nll_reference", "nll_candidate", "same_top")
        )
    )


def summarise(sequences: Sequence[TokenScores]) -> Divergence:
    """Figures over all tokens; standard errors treat each sequence as one draw."""
    every = join(sequences)
    median, p90, p99, p999, top = np.quantile(every.kl, (0.5, 0.9, 0.99, 0.999, 1.0))
    ratio = clustered([part.nll_candidate - part.nll_reference for part in sequences])
    factor = float(np.exp(ratio.mean))
    error = None if ratio.standard_error is None else factor * ratio.standard_error
    return Divergence(
        n_tokens=len(every.kl),
        n_sequences=len(sequences),
        kl=clustered([part.kl for part in sequences]),
        kl_median=float(median),
        kl_90=float(p90),
        kl_99=float(p99),
        kl_999=float(p999),
        kl_max=float(top),
        same_top=clustered([part.same_top.astype(np.float64) for part in sequences]),
        delta_p_rms=float(np.sqrt(np.mean(every.delta_p**2))),
        perplexity_reference=float(np.exp(every.nll_reference.mean())),
        perplexity=float(np.exp(every.nll_candidate.mean())),
        perplexity_ratio=Estimate(factor, error),
    )


def clustered(groups: Sequence[np.ndarray]) -> Estimate:
    """Mean over all values; standard error from the groups' summed residuals, with the C/(C-1) correction."""
    n = sum(len(group) for group in groups)
    mean = float(sum(float(group.sum()) for group in groups) / n)
    if len(groups) < 2:
        return Estimate(mean, None)
    residuals = np.array([float((group - mean).sum()) for group in groups])
    c = len(groups)
    return Estimate(mean, float(np.sqrt(c / (c - 1) * (residuals**2).sum()) / n))
