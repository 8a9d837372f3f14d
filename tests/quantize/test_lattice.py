"""Weights that already lie on a quantization lattice are found and packed without loss; others are not."""

import numpy as np
import pytest

from models.tensors import to_float32
from quantize.errors import QuantizeError
from quantize.gguf_files.floats import from_float32
from quantize.gguf_files.types import dequantize_rows, quantize_rows
from quantize.rounding import lattice
from quantize.rounding.lattice import LATTICES, find_lattice

N = 256


def ordinary(seed: int = 0, rows: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, N)).astype(np.float32) * 0.02


def stored_as(weights: np.ndarray, dtype) -> np.ndarray:
    """What is read back after storing."""
    return np.array(to_float32(from_float32(weights, dtype)), np.float32)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("name", LATTICES)
def test_dequantized_weights_are_packed_exactly(name, dtype):
    importance = np.random.default_rng(2).random(N).astype(np.float32) + 0.01
    for weighing in (None, importance):
        source = dequantize_rows(name, quantize_rows(name, ordinary(), weighing), N)
        read = stored_as(source, dtype)
        found = find_lattice(read, stored=dtype)
        assert found is not None
        again = dequantize_rows(found.type, found.data, N)
        np.testing.assert_array_equal(stored_as(again, dtype), read)
        assert found.is_exact
        assert LATTICES.index(found.type) <= LATTICES.index(name)
        if dtype == "F32":
            np.testing.assert_array_equal(again, source)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_ordinary_weights_are_left_alone(dtype):
    drawn = np.random.default_rng(3)
    for weights in (ordinary(), drawn.standard_t(2, (24, N)), 0.05 + ordinary(), drawn.laplace(size=(24, N))):
        assert find_lattice(stored_as(weights.astype(np.float32), dtype), stored=dtype) is None


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1"])
def test_large_matrices_are_packed_a_chunk_at_a_time(name, monkeypatch):
    read = dequantize_rows(name, quantize_rows(name, ordinary(), None), N)
    whole = find_lattice(read, stored="F32")
    monkeypatch.setattr(lattice, "CHUNK", 7)
    parts = find_lattice(read, stored="F32")
    assert whole is not None
    assert parts is not None
    np.testing.assert_array_equal(whole.data, parts.data)


def test_one_block_off_the_lattice_is_enough_to_leave_the_rest():
    read = dequantize_rows("Q4_0", quantize_rows("Q4_0", ordinary(), None), N)
    read[17, 40] *= 1.2
    assert find_lattice(read, stored="F32", types=("Q4_0",)) is None


def test_trained_scales_that_are_no_float16_numbers_are_found_and_told():
    rng = np.random.default_rng(4)
    codes = rng.integers(-7, 8, (24, N // 32, 32))
    scales = rng.random((24, N // 32, 1), np.float32) * 0.01 + 0.01
    weights = (codes * scales).astype(np.float32).reshape(24, N)
    found = find_lattice(weights, stored="F32")
    assert found is not None
    assert (found.type, found.is_exact) == ("Q4_0", False)
    assert 0 < found.largest_error < 8 * 2**-11
    np.testing.assert_allclose(dequantize_rows("Q4_0", found.data, N), weights, rtol=2**-10)


def test_dequantized_weights_survive_what_round_to_nearest_would_lose():
    """ggml's own rounding takes an extreme of -8; blocks whose codes end at 5 are not what it would make."""
    rng = np.random.default_rng(5)
    codes = rng.integers(-3, 6, (8, N // 32, 32))
    weights = (codes * np.float32(0.0078125)).reshape(8, N)
    found = find_lattice(weights, stored="BF16")
    assert found is not None
    assert (found.type, found.is_exact) == ("Q4_0", True)
    lost = dequantize_rows("Q4_0", quantize_rows("Q4_0", weights, None), N)
    assert np.abs(lost - weights).max() > 0.0005


def test_zeros_lie_on_the_smallest_lattice():
    found = find_lattice(np.zeros((4, N), np.float32), stored="F16")
    assert found is not None
    assert (found.type, found.is_exact, found.largest_error) == ("Q4_0", True, 0)


def test_rows_that_do_not_fill_blocks_are_on_no_lattice():
    assert find_lattice(np.zeros((4, 40), np.float32), stored="F16") is None


def test_bad_weights_are_refused():
    with pytest.raises(QuantizeError, match="NaN or infinity"):
        find_lattice(np.full((2, 32), np.nan, np.float32), stored="F32")
    with pytest.raises(QuantizeError, match=r"shape \(32,\) are not rows"):
        find_lattice(np.zeros(32, np.float32), stored="F32")
