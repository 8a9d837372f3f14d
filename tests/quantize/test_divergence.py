"""Divergence against a plain float64 implementation, and the standard errors against simulation."""

import math

import numpy as np
import pytest

from quantize.divergence import BLOCK, clustered, join, log_softmax, score, summarise


def plain(reference, candidate, targets):
    """KL, both NLLs and same-top by the book, one row at a time, in float64."""
    rows = []
    for p_logits, q_logits, target in zip(reference, candidate, targets, strict=True):
        p, q = np.asarray(p_logits, np.float64), np.asarray(q_logits, np.float64)
        p = p - (p.max() + math.log(sum(math.exp(x - p.max()) for x in p)))
        q = q - (q.max() + math.log(sum(math.exp(x - q.max()) for x in q)))
        kl = sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
        rows.append((kl, -p[target], -q[target], p.argmax() == q.argmax()))
    return np.array(rows, np.float64).T


@pytest.mark.parametrize("noise", [1e-3, 0.1, 3.0])
def test_scores_equal_the_plain_implementation(noise):
    random = np.random.default_rng(0)
    n = 2 * BLOCK + 5
    reference = random.normal(0, 4, (n, 700)).astype(np.float32) + 50
    candidate = reference + random.normal(0, noise, reference.shape).astype(np.float32) - 80
    targets = random.integers(0, 700, n)
    found = score(log_softmax(reference), candidate, targets)
    kl, nll_p, nll_q, same = plain(reference, candidate, targets)
    np.testing.assert_allclose(found.kl, kl, rtol=1e-3, atol=2e-6)
    np.testing.assert_allclose(found.nll_reference, nll_p, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.nll_candidate, nll_q, rtol=1e-5, atol=1e-5)
    assert (found.same_top == same.astype(bool)).all()
    np.testing.assert_allclose(found.delta_p, np.exp(-nll_q) - np.exp(-nll_p), atol=1e-5)


def test_a_model_against_itself_diverges_by_nothing():
    logits = np.random.default_rng(1).normal(0, 10, (20, 50_000)).astype(np.float32)
    found = summarise([score(log_softmax(logits), logits, np.zeros(20, int))] * 2)
    assert abs(found.kl.mean) < 1e-6
    assert found.same_top.mean == 1
    assert found.perplexity_ratio.mean == pytest.approx(1, abs=1e-6)
    assert found.delta_p_rms < 1e-6


def test_extreme_logits_stay_finite():
    logits = np.array([[1e4, -1e4, 0.0]], np.float32)
    found = score(log_softmax(logits), -logits, np.array([0]))
    assert np.isfinite(found.kl).all()
    assert found.kl[0] == pytest.approx(2e4, rel=1e-3)


def test_summary_counts_tokens_and_orders_its_quantiles():
    random = np.random.default_rng(2)
    parts = []
    for n in (5, 40, 300):
        logits = random.normal(0, 2, (n, 64)).astype(np.float32)
        parts.append(
            score(log_softmax(logits), logits + random.normal(0, 0.3, logits.shape).astype(np.float32),
                  random.integers(0, 64, n))
        )  # fmt: skip
    found = summarise(parts)
    every = join(parts)
    assert (found.n_tokens, found.n_sequences) == (345, 3)
    assert found.kl.mean == pytest.approx(every.kl.mean())
    assert found.kl_median <= found.kl_90 <= found.kl_99 <= found.kl_999 <= found.kl_max
    assert found.kl_max == every.kl.max()
    assert found.perplexity_ratio.mean == pytest.approx(found.perplexity / found.perplexity_reference)
    assert found.delta_p_rms == pytest.approx(math.sqrt((every.delta_p**2).mean()))


def test_standard_error_covers_the_spread_between_conversations():
    """Conversations that differ in level: the clustered error is the true one, the naive one is too small."""
    random = np.random.default_rng(3)
    means, errors = [], []
    for _ in range(400):
        levels = random.normal(0, 1, 40)
        found = clustered([level + random.normal(0, 0.1, 50) for level in levels])
        means.append(found.mean)
        errors.append(found.standard_error)
    true = np.std(means)
    assert np.mean(errors) == pytest.approx(true, rel=0.1)


def test_one_conversation_has_no_standard_error():
    assert clustered([np.array([1.0, 2.0])]).standard_error is None
