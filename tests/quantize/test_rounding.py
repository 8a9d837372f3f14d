"""Rounding is never worse than ggml's, better where columns are correlated, and readable by any llama.cpp."""

from collections.abc import Callable
from itertools import product
from typing import TypeVar

import numpy as np
import pytest
import torch

from quantize.errors import QuantizeError
from quantize.gguf_files.packing import FORMATS, unpack
from quantize.gguf_files.types import dequantize_rows, quantize_rows
from quantize.rounding import curvature as curvature_module
from quantize.rounding import descent as descent_module
from quantize.rounding import kernels
from quantize.rounding.curvature import BadHessian, inverse_factor, prepare
from quantize.rounding.descent import Visit
from quantize.rounding.feedback import feed_back
from quantize.rounding.grid import from_blocks, inverse, nearest
from quantize.rounding.matrix import Steps, round_matrix
from quantize.rounding.scales import affine, refine_integers, symmetric

N = 256
T = TypeVar("T")
ONE_AT_A_TIME = {
    "search": Steps(feedback=False, descent=0),
    "feedback": Steps(search=False, descent=0),
    "descent": Steps(search=False, feedback=False),
    "search and feedback": Steps(descent=0),
    "search by the diagonal and feedback": Steps(conditional=False, descent=0),
    "descent without blocks": Steps(blocks=False),
    "all": Steps(),
}


def activations(seed: int, tokens: int, n: int = N, *, rank: int = 24) -> np.ndarray:
    """Correlated columns of unlike size, as hidden states are; the mixing is the same for every seed."""
    mixing = np.random.default_rng(99).standard_normal((rank, n)) * np.geomspace(3, 0.1, n)
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((tokens, n)) * 0.3
    return (rng.standard_normal((tokens, rank)) @ mixing / rank**0.5 + noise).astype(np.float32)


def hessian_of(x: np.ndarray) -> np.ndarray:
    return x.T @ x / np.float32(len(x))


def some_weights(rows: int = 40, n: int = N, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(5, (rows, n)).astype(np.float32) * 0.05


def exact_loss(weights: np.ndarray, values: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    error = weights.astype(np.float64) - values
    return ((error @ hessian) * error).sum(1)


@pytest.fixture(scope="module")
def hessian() -> np.ndarray:
    return hessian_of(activations(1, 1500))


@pytest.mark.parametrize("steps", ONE_AT_A_TIME.values(), ids=ONE_AT_A_TIME)
@pytest.mark.parametrize("name", FORMATS)
def test_no_row_is_worse_than_ggmls_and_bytes_are_what_is_said(name, steps, hessian):
    weights = some_weights()
    weights[0], weights[1] = 0, 0.1
    weights[2] *= 1e-5
    made = round_matrix(weights, name, hessian=hessian, steps=steps)
    baseline = dequantize_rows(name, quantize_rows(name, weights, np.diagonal(hessian)), N)
    np.testing.assert_array_equal(dequantize_rows(name, made.data, N), made.values)
    ours, theirs = (exact_loss(weights, values, hessian) for values in (made.values, baseline))
    assert (ours <= theirs * (1 + 1e-4) + 1e-12).all()
    np.testing.assert_allclose(made.row_loss, ours, rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(made.baseline_row_loss, theirs, rtol=1e-3, atol=1e-9)
    assert made.loss < made.baseline_loss


@pytest.mark.parametrize("name", FORMATS)
def test_held_out_loss_falls_where_columns_are_correlated(name, hessian):
    weights, held_out = some_weights(96), hessian_of(activations(2, 1500))
    made = round_matrix(weights, name, hessian=hessian)
    baseline = dequantize_rows(name, quantize_rows(name, weights, np.diagonal(hessian)), N)
    ratio = exact_loss(weights, made.values, held_out).sum() / exact_loss(weights, baseline, held_out).sum()
    assert ratio < 0.7


@pytest.mark.parametrize("name", FORMATS)
def test_without_a_hessian_the_search_lowers_the_weighted_error(name):
    weights, importance = some_weights(), np.geomspace(1, 1e-3, N).astype(np.float32)
    made = round_matrix(weights, name, importance=importance)
    baseline = dequantize_rows(name, quantize_rows(name, weights, importance), N)
    ours, theirs = (((weights - v) ** 2 @ importance) for v in (made.values, baseline))
    assert (ours <= theirs * (1 + 1e-5)).all()
    assert made.loss < 0.985 * made.baseline_loss
    assert made.method == "scale search"


@pytest.mark.parametrize("name", ["Q4_0", "IQ4_NL", "Q4_1"])
def test_search_equals_brute_force_over_all_scales_of_a_block(name):
    """Thousands of scales, and as many minimums as matter, are no better than what the search finds."""
    form = FORMATS[name]
    rng = np.random.default_rng(6)
    weights = rng.standard_normal((8, 32)).astype(np.float32)
    importance = (rng.random(32) + 0.05).astype(np.float32)
    made = round_matrix(weights, name, importance=importance)
    largest = float(np.abs(weights).max()) / max(abs(form.levels[0]), 3)
    scales = np.unique(np.linspace(-largest, largest, 1201).astype(np.float16).astype(np.float32))
    minimums = np.linspace(-4, 0, 101, dtype=np.float16) if form.has_minimum else np.zeros(1, np.float16)
    levels = np.array(form.levels, np.float32)
    least = np.full(len(weights), np.inf)
    for minimum in minimums.astype(np.float32):
        for scale in scales[scales > 0] if form.has_minimum else scales[scales != 0]:
            wanted = (weights - minimum) / scale
            code = np.searchsorted(form.midpoints, wanted)
            error = (weights - levels[code] * scale - minimum) ** 2 @ importance
            least = np.minimum(least, error)
    assert (made.row_loss <= least * 1.1).all()
    assert made.loss <= least.sum() * 1.02


def test_descent_finds_the_best_codes_of_a_tiny_problem():
    """Four columns that matter: all 16^4 codes at the scale that was chosen are compared."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((64, 4)) @ rng.standard_normal((4, 4))
    hessian = np.zeros((32, 32), np.float32)
    hessian[:4, :4] = hessian_of(x.astype(np.float32))
    weights = rng.standard_normal((6, 32)).astype(np.float32)
    curvature = prepare(hessian, shrinkage=0, damping=1e-4)
    made = round_matrix(weights, "Q4_0", hessian=curvature, steps=Steps(descent=20))
    scale = made.data[:, :2].copy().view(np.float16).astype(np.float64)
    codes = np.array(list(product(range(-8, 8), repeat=4)))
    ratios = []
    for row in range(len(weights)):
        error = weights[row, :4] - codes * scale[row]
        least = ((error @ hessian[:4, :4]) * error).sum(1).min()
        ratios.append(made.row_loss[row] / least)
    assert min(ratios) > 0.999
    assert np.median(ratios) < 1.5


def test_each_step_helps(hessian):
    weights, curvature = some_weights(96), prepare(hessian, shrinkage=0)
    made = {
        name: round_matrix(weights, "Q4_0", hessian=curvature, steps=steps)
        for name, steps in ONE_AT_A_TIME.items()
    }
    loss, plain = {name: one.loss for name, one in made.items()}, made["all"].baseline_loss
    assert loss["all"] < loss["search and feedback"] < min(loss["search"], loss["feedback"]) < plain
    assert loss["all"] < loss["descent without blocks"] < loss["search and feedback"]
    assert loss["descent"] < plain


def test_same_input_gives_the_same_bytes_and_rows_do_not_touch_each_other(hessian, monkeypatch):
    from quantize.rounding import matrix as rounding

    weights = some_weights(24)
    once = round_matrix(weights, "Q4_1", hessian=hessian)
    again = round_matrix(weights, "Q4_1", hessian=prepare(hessian))
    np.testing.assert_array_equal(once.data, again.data)
    monkeypatch.setattr(rounding, "FEWEST_ROWS", 12)
    monkeypatch.setattr(rounding, "MOST_ROWS", 12)
    apart = round_matrix(weights, "Q4_1", hessian=hessian)
    assert apart.loss == pytest.approx(once.loss, rel=0.01)
    np.testing.assert_allclose(apart.row_loss, once.row_loss, rtol=0.5)


@pytest.mark.parametrize("name", ["Q4_0", "Q2_K", "Q6_K"])
def test_columns_that_nothing_drives_and_fewer_tokens_than_columns(name):
    x = activations(3, 30)
    x[:, 5::7] = 0
    hessian = hessian_of(x)
    weights = some_weights()
    made = round_matrix(weights, name, hessian=prepare(hessian, shrinkage=0.5))
    assert made.loss < 0.8 * made.baseline_loss
    error = np.abs(made.values - weights)
    assert error[:, 5::7].mean() < 3 * error[:, 6::7].mean()


def test_a_hessian_of_zeros_keeps_ggmls_rounding():
    weights = some_weights()
    made = round_matrix(weights, "Q4_0", hessian=np.zeros((N, N), np.float32))
    np.testing.assert_array_equal(made.data, quantize_rows("Q4_0", weights, np.ones(N, np.float32)))
    assert made.kept.all()


@pytest.mark.parametrize("at_once", [64, 9])
def test_factor_is_that_of_the_inverse(at_once, monkeypatch):
    monkeypatch.setattr(curvature_module, "SOLVED_AT_ONCE", at_once)
    exact = torch.from_numpy(hessian_of(activations(4, 500, 64)).astype(np.float64))
    factor = inverse_factor(exact)
    assert factor is not None
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(exact), rtol=1e-6, atol=1e-8)
    assert torch.equal(factor, factor.triu())
    assert inverse_factor(-exact) is None


def test_the_factor_of_single_precision_is_that_of_double():
    exact = hessian_of(activations(4, 300))
    single, double = prepare(exact, shrinkage=0.01), prepare(exact, shrinkage=0.0099999)
    torch.testing.assert_close(
        single.factor, double.factor, rtol=1e-3, atol=1e-4 * float(double.factor.max())
    )
    assert not torch.equal(single.factor, double.factor)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K"])
def test_columns_far_away_are_told_of_all_moves_at_last(name, monkeypatch):
    n = 320 if FORMATS[name].block == 32 else 768
    weights = some_weights(24, n)
    curvature = prepare(hessian_of(activations(5, 2000, n)), shrinkage=0)
    losses = {}
    for stretch in (32, 256, 512):
        monkeypatch.setattr(descent_module, "STRETCH", stretch)
        losses[stretch] = round_matrix(weights, name, hessian=curvature).loss
    assert losses[256] == pytest.approx(losses[32], rel=1e-3)
    assert losses[512] == pytest.approx(losses[32], rel=1e-3)


def test_few_tokens_are_believed_less():
    exact = hessian_of(activations(4, 64))
    few, many, unknown = (prepare(exact, n_tokens=n) for n in (64, 64000, None))
    off = [float(c.damped[0, 1] / c.plain[0, 1]) for c in (few, many, unknown)]
    assert off == pytest.approx([64 / 2624, 64000 / 66560, 0.8], rel=1e-4)
    assert float(few.diagonal[0]) == pytest.approx(exact[0, 0] + 0.01 * np.trace(exact) / N, rel=1e-4)


def test_shrinking_pays_on_other_texts_where_tokens_are_few():
    weights, x = some_weights(64), activations(5, 64, rank=128)
    held_out = hessian_of(activations(6, 2000, rank=128))

    def lost(**options) -> float:
        made = round_matrix(weights, "Q4_0", hessian=prepare(hessian_of(x), **options))
        return exact_loss(weights, made.values, held_out).sum()

    assert lost(n_tokens=64) < lost(shrinkage=0)


def test_what_is_not_positive_semidefinite_is_refused():
    bad = np.eye(32, dtype=np.float32)
    bad[0, 1] = bad[1, 0] = 50
    with pytest.raises(BadHessian, match="not positive semidefinite"):
        prepare(bad)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda h: h[:, :31], r"\(n, n\), not \(32, 31\)"),
        (lambda h: h * np.nan, "NaN or infinity"),
        (lambda h: -h, "on its diagonal"),
        (lambda h: h + np.triu(np.ones_like(h), 1), "not symmetric"),
    ],
)
def test_matrices_that_are_no_hessian_are_refused(spoil, says):
    with pytest.raises(BadHessian, match=says):
        round_matrix(some_weights(2, 32), "Q4_0", hessian=spoil(np.eye(32, dtype=np.float32)))


def test_bad_requests_are_refused_by_name(hessian):
    with pytest.raises(QuantizeError, match="'Q4_K_M' is not a format"):
        round_matrix(some_weights(), "Q4_K_M", hessian=hessian)
    with pytest.raises(BadHessian, match="256 columns does not belong to rows of 64"):
        round_matrix(some_weights(2, 64), "Q4_0", hessian=hessian)
    with pytest.raises(QuantizeError, match="blocks of 256 weights, and rows of 64"):
        round_matrix(some_weights(2, 64), "Q4_K")
    with pytest.raises(QuantizeError, match="damping is -1"):
        prepare(hessian, damping=-1)
    with pytest.raises(QuantizeError, match=r"shrinkage is 1.5; give 0 .none. to 1"):
        prepare(hessian, shrinkage=1.5)
    with pytest.raises(QuantizeError, match="NaN"):
        round_matrix(np.full((2, N), np.nan, np.float32), "Q4_0", hessian=hessian)
    with pytest.raises(QuantizeError, match=r"importance has shape \(3,\)"):
        round_matrix(some_weights(), "Q4_0", importance=np.ones(3, np.float32))


ROWS = 70  # more than a tile, and not whole ones


@pytest.fixture
def in_both(monkeypatch) -> Callable[[Callable[[], T]], tuple[T, T]]:
    """What a function comes to by compiled loops and by torch."""

    def run(work: Callable[[], T]) -> tuple[T, T]:
        assert kernels.are_there()
        compiled = work()
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "are_there", lambda: False)
            return compiled, work()

    return run


def some_columns() -> torch.Tensor:
    weights = some_weights(ROWS)
    weights[0], weights[1, :200], weights[-1] = 0, 0, 0.1
    return torch.from_numpy(weights.T.copy())


IMPORTANCE = torch.from_numpy(np.geomspace(1, 1e-3, N).astype(np.float32))


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_compiled_loops_choose_the_scales_that_torch_chooses(name, quick, in_both):
    """Sums differ in their last bits, which decides between two candidates that are as good."""
    form = FORMATS[name]
    x, v = some_columns().view(-1, form.group, ROWS), IMPORTANCE.view(-1, form.group, 1)

    def errors() -> torch.Tensor:
        step, offset = symmetric(form, x, v, quick=quick), torch.zeros(())
        return left_over(step, offset)

    def errors_with_minimum() -> torch.Tensor:
        highest, negative = len(form.levels) - 1, form.minimums is not None
        step, offset = affine(x, v, highest, negative=negative, quick=quick)
        return left_over(step, offset[:, None])

    def left_over(step: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        level = nearest(form, (x - offset) * inverse(step)[:, None])
        return ((x - level * step[:, None] - offset).square() * v).sum(1)

    compiled, by_torch = in_both(errors_with_minimum if form.has_minimum else errors)
    assert compiled.shape == (N // form.group, ROWS)
    assert float(compiled.sum()) == pytest.approx(float(by_torch.sum()), rel=0.002)
    assert torch.isclose(compiled, by_torch, rtol=0.02, atol=1e-12).float().mean() > 0.95


@pytest.mark.parametrize("name", FORMATS)
def test_compiled_loops_set_integers_and_levels_as_torch_does(name, hessian, in_both):
    form, weights = FORMATS[name], some_columns()
    start = from_blocks(form, unpack(form, quantize_rows(name, weights.T.numpy().copy(), None)))
    curvature = prepare(hessian)

    def refined() -> list[torch.Tensor]:
        grid = start.copy()
        refine_integers(grid, weights.view(-1, form.group, ROWS), IMPORTANCE.view(-1, form.group, 1))
        return [
            grid.level.view(N, ROWS),
            *(each for each in (grid.scales, grid.minimums) if each is not None),
        ]

    def fed_back() -> list[torch.Tensor]:
        grid = start.copy()
        feed_back(weights, curvature, grid, choose_scales=False)
        return [grid.level]

    def moved() -> list[torch.Tensor]:
        grid = start.copy()
        width = max(form.block, 32)
        pull = torch.zeros(width, ROWS)
        pull[:32] = curvature.damped[:32, :32] @ (weights - grid.values())[:32]
        visit = Visit(grid.part(0, width), curvature.part(0, width), pull)
        visit.move_codes()
        return [grid.level, visit.pull]

    for work in (refined, fed_back, moved) if form.scales else (fed_back, moved):
        for compiled, by_torch in zip(*in_both(work), strict=True):
            same = torch.isclose(compiled, by_torch, rtol=1e-3, atol=1e-6).float().mean()
            assert same > 0.97, (work.__name__, same)


@pytest.mark.parametrize("name", FORMATS)
def test_compiled_loops_round_as_well_as_torch(name, hessian, in_both):
    weights = some_columns().T.numpy().copy()
    compiled, by_torch = in_both(lambda: round_matrix(weights, name, hessian=hessian))
    assert compiled.loss == pytest.approx(by_torch.loss, rel=0.01)


def test_rounding_works_without_the_library(hessian, monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "library_path", lambda: tmp_path / "librounding.so")
    kernels.are_there.cache_clear()
    try:
        assert not kernels.are_there()
        assert round_matrix(some_weights(8), "Q4_K", hessian=hessian).loss > 0
        (tmp_path / "librounding.so").write_text("not a library")
        kernels.are_there.cache_clear()
        kernels._library.cache_clear()
        assert not kernels.are_there()
    finally:
        kernels.are_there.cache_clear()
        kernels._library.cache_clear()
