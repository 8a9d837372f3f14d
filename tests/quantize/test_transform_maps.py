"""Linear maps of activations, and the search for scales, against plain float64 numpy."""

import numpy as np
import pytest

from quantize.transforms.maps import (
    Chain,
    Padding,
    Parts,
    Permutation,
    Scale,
    moments,
    random_rotation,
    rows,
)
from quantize.transforms.scaling import MAX_RATIO, balanced, loss, sampled, search

RANDOM = np.random.default_rng(0)
N = 24
ROTATION = random_rotation(6, 4, RANDOM)
ORDER = Permutation(RANDOM.permutation(N))
MAPS = {
    "scale": Scale(np.exp(RANDOM.normal(size=N))),
    "rotation": ROTATION,
    "order": ORDER,
    "padding": Padding(8),
    "chain": Chain((Scale(np.exp(RANDOM.normal(size=N))), ORDER, Padding(8))),
    "rotated chain": Chain((Scale(np.exp(RANDOM.normal(size=N))), ROTATION)),
    "parts": Parts([(6, None), (12, Scale(np.exp(RANDOM.normal(size=12)))), (6, Padding(2))]),
    "rotated parts": Parts([(12, random_rotation(4, 3, RANDOM)), (12, None)]),
}


@pytest.mark.parametrize("name", MAPS)
def test_product_stays_what_it_was(name):
    change = MAPS[name]
    x, weights = RANDOM.normal(size=(5, N)), RANDOM.normal(size=(7, N))
    np.testing.assert_allclose(change.forward(x) @ change.backward(weights).T, x @ weights.T, atol=1e-12)


@pytest.mark.parametrize("name", MAPS)
def test_moments_are_those_of_the_mapped_activations(name):
    change = MAPS[name]
    x = RANDOM.normal(size=(50, N)) * np.linspace(0.1, 3, N)
    mapped = change.forward(x)
    np.testing.assert_allclose(moments(change, x.T @ x / 50), mapped.T @ mapped / 50, atol=1e-12)
    squares = change.squares((x**2).mean(0))
    if "rot" in name:
        assert squares is None
    else:
        np.testing.assert_allclose(squares, (mapped**2).mean(0), atol=1e-12)


@pytest.mark.parametrize("name", MAPS)
def test_who_makes_the_activations_makes_mapped_ones(name):
    change = MAPS[name]
    maker, bias, x = RANDOM.normal(size=(N, 9)), RANDOM.normal(size=N), RANDOM.normal(size=9)
    made = rows(change, maker) @ x + rows(change, bias)
    np.testing.assert_allclose(made, change.forward(maker @ x + bias), atol=1e-12)


@pytest.mark.parametrize("name", MAPS)
def test_types_stay(name):
    change = MAPS[name]
    weights = np.ones((3, N), np.float32)
    assert change.forward(weights).dtype == change.backward(weights).dtype == np.float32


@pytest.mark.parametrize("width", [1, 8, 64, 6, 96])
def test_random_rotations_are_orthogonal_and_differ(width):
    blocks = random_rotation(width, 3, np.random.default_rng(1)).blocks
    eye = np.broadcast_to(np.eye(width), blocks.shape)
    np.testing.assert_allclose(blocks @ blocks.transpose(0, 2, 1), eye, atol=1e-12)
    if width > 1:
        assert np.abs(blocks[0] - blocks[1]).max() > 0.1
    if width in (8, 64):
        np.testing.assert_allclose(np.abs(blocks), 1 / np.sqrt(width))


def coarse(weights: np.ndarray, _: np.ndarray) -> np.ndarray:
    """Blocks of 8 columns with one scale, 4 bits."""
    blocks = weights.reshape(len(weights), -1, 8)
    scale = np.abs(blocks).max(-1, keepdims=True) / 7
    return (np.round(blocks / np.maximum(scale, 1e-30)) * scale).reshape(weights.shape).astype(np.float32)


def drawn(spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and moments of activations whose squares differ by channel."""
    random = np.random.default_rng(2)
    weights = random.normal(size=(40, N)).astype(np.float32)
    x = random.normal(size=(400, N)) * np.exp(spread * random.normal(size=N))
    return weights, (x.T @ x / 400).astype(np.float32)


def test_channels_that_are_driven_more_are_rounded_more_finely():
    weights, hessian = drawn(2.0)
    found = search([weights], hessian, coarse)
    assert found.ratio < 0.7
    assert found.alpha > 0
    assert np.corrcoef(np.log(found.factors), np.log(np.diagonal(hessian)))[0, 1] > 0.9


def test_ratio_is_the_loss_over_that_without_factors():
    weights, hessian = drawn(1.0)
    found = search([weights], hessian, coarse)
    scaled = weights.astype(np.float64) * found.factors
    error = (coarse(scaled.astype(np.float32), hessian) - scaled) / found.factors
    plain = coarse(weights, hessian) - weights.astype(np.float64)
    ratio = np.trace(error @ hessian @ error.T) / np.trace(plain @ hessian @ plain.T)
    assert found.ratio == pytest.approx(ratio, rel=1e-4)


def test_factors_stay_one_where_nothing_gains():
    weights, hessian = drawn(1.0)
    found = search([weights], hessian, lambda weights, _: weights * np.float32(0.99))
    assert found.ratio == 1
    np.testing.assert_array_equal(found.factors, np.ones(N))


def test_weights_that_are_exact_already_are_left_alone():
    weights, hessian = drawn(1.0)
    assert search([weights], hessian, lambda weights, _: weights).ratio == 1


def test_shared_channels_get_one_factor():
    weights, hessian = drawn(2.0)
    shared = np.tile(np.arange(8), 3)
    found = search([weights], hessian, coarse, shared=shared)
    assert found.ratio < 1
    for channel in range(8):
        assert len(set(found.factors[shared == channel].tolist())) == 1


def test_factors_are_bounded_and_channels_never_driven_have_one():
    squares = np.array([0.0, 1e-30, 1e-3, 1.0, 1e9])
    factors = balanced(squares, np.ones(5), 0.5, 0.0)
    assert np.isfinite(factors).all()
    assert factors.max() / factors.min() <= MAX_RATIO * (1 + 1e-5)
    assert (np.diff(factors) >= 0).all()
    np.testing.assert_array_equal(balanced(np.zeros(3), np.zeros(3), 0.5, 0.5), np.ones(3))


def test_loss_is_the_trace():
    weights, hessian = drawn(1.0)
    error = (coarse(weights, hessian) - weights).astype(np.float64)
    assert loss(weights, hessian, coarse) == pytest.approx(np.trace(error @ hessian @ error.T), rel=1e-4)


def test_samples_are_rows_spread_over_the_matrix():
    weights = np.arange(20.0).reshape(10, 2)
    np.testing.assert_array_equal(sampled(weights, 5), weights[::2])
    assert sampled(weights, 10) is weights
