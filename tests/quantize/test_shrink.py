"""Shrunk estimates of divergence against truths that are known."""

import numpy as np
import pytest

from quantize.sensitivity.record import Sensitivities

TYPES = ("A", "B", "C", "D")
NAMES = tuple(f"blk.{layer}.{kind}.weight" for layer in range(12) for kind in ("attn_q", "ffn_up"))


def drawn(truth: np.ndarray, expected: np.ndarray, *, n_windows: int, n_draws: int = 2) -> Sensitivities:
    """What n_windows * n_draws samples would show of true costs, with windows of unequal difficulty."""
    random = np.random.default_rng(1)
    hard = np.sqrt(random.uniform(0.5, 1.5, (n_windows, 1, 1, 1)))
    noise = hard * random.normal(size=(n_windows, n_draws, *truth.shape))
    projections = (np.sqrt(2 * 100 * truth) * noise).reshape(-1, *truth.shape)
    return Sensitivities(
        "",
        NAMES,
        TYPES,
        100,
        n_draws,
        projections.astype(np.float32),
        expected,
        expected,
        expected,
        inputs=np.zeros((len(NAMES), 2)),
        shares=np.ones(len(NAMES)),
    )


def truth_and_expected(spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Costs whose ratio to the expected ones drifts slowly over layers, with a type's own excess."""
    random = np.random.default_rng(0)
    expected = 10.0 ** random.uniform(-4, -2, (len(NAMES), len(TYPES)))
    layers = np.repeat(np.arange(12), 2)[:, None]
    own = spread * random.normal(size=expected.shape)
    ratio = np.exp(0.5 * np.sin(layers / 4) + np.array([0, 0, 0.4, 0]) + own)
    return expected * ratio, expected


def error(estimate: np.ndarray, truth: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.log(estimate / truth) ** 2)))


@pytest.mark.parametrize("n_windows", [32, 128])
def test_shrunk_costs_are_nearer_the_truth_than_raw_ones(n_windows):
    truth, expected = truth_and_expected(0.05)
    made = drawn(truth, expected, n_windows=n_windows)
    assert error(made.shrunk(), truth) < 0.7 * error(made.raw(), truth)


def test_with_many_samples_shrunk_costs_are_what_was_measured():
    truth, expected = truth_and_expected(0.8)
    made = drawn(truth, expected, n_windows=3000)
    assert error(made.shrunk(), truth) < 0.04
    np.testing.assert_allclose(made.shrunk(), made.raw(), rtol=0.1)


def test_types_not_offered_stay_unknown_and_exact_ones_cost_nothing():
    truth, expected = truth_and_expected(0.1)
    truth[3, 1], expected[3, 1] = 0.0, 0.0
    truth[5, 2], expected[5, 2] = np.nan, np.nan
    truth[7], expected[7] = 0.0, 0.0
    shrunk = drawn(truth, expected, n_windows=64).shrunk()
    assert shrunk[3, 1] == 0
    assert (shrunk[7] == 0).all()
    assert np.isnan(shrunk[5, 2])
    known = np.ones_like(shrunk, bool)
    known[3, 1] = known[5, 2] = known[7] = False
    assert (shrunk[known] > 0).all()
