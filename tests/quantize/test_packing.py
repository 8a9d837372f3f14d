"""Blocks to bytes and back, against ggml's own bytes and values."""

import numpy as np
import pytest

from quantize.errors import QuantizeError
from quantize.gguf_files.packing import FORMATS, Blocks, block_format, pack, unpack, values
from quantize.gguf_files.tensor_types import row_bytes, tensor_type
from quantize.gguf_files.types import dequantize_rows, quantize_rows

N = 512


def weights(seed: int = 0, rows: int = 12) -> np.ndarray:
    """Heavy tails, a row of zeros, a constant row and one of tiny numbers."""
    drawn = np.random.default_rng(seed).standard_t(4, (rows, N)).astype(np.float32) * 0.05
    drawn[0] = 0
    drawn[1] = 0.25
    drawn[2] *= 1e-6
    return drawn


@pytest.mark.parametrize("name", FORMATS)
def test_ggmls_own_bytes_come_back(name):
    data = quantize_rows(name, weights(), None)
    blocks = unpack(FORMATS[name], data)
    np.testing.assert_array_equal(pack(FORMATS[name], blocks), data)


@pytest.mark.parametrize("name", FORMATS)
def test_values_are_ggmls_bit_for_bit(name):
    data = quantize_rows(name, weights(), None)
    got = values(FORMATS[name], unpack(FORMATS[name], data))
    wanted = dequantize_rows(name, data, N)
    np.testing.assert_array_equal(got.view(np.uint32) & 0x7FFFFFFF, wanted.view(np.uint32) & 0x7FFFFFFF)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("name", FORMATS)
def test_every_byte_means_something_and_comes_back(name):
    """Any bytes are some block; only the float16 numbers are kept finite."""
    form, kind = FORMATS[name], tensor_type(name)
    rng = np.random.default_rng(1)
    drawn = unpack(form, rng.integers(0, 256, (40, N // form.block * kind.block_bytes), dtype=np.uint8))
    halves = rng.standard_normal(drawn.scale.shape).astype(np.float16)
    blocks = Blocks(
        drawn.codes, halves, None if drawn.minimum is None else -halves, drawn.scales, drawn.minimums
    )
    data = pack(form, blocks)
    again = unpack(form, data)
    for field in Blocks.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(again, field), getattr(blocks, field))
    np.testing.assert_array_equal(values(form, blocks), dequantize_rows(name, data, N))
    assert blocks.codes.max() == len(form.levels) - 1
    if blocks.scales is not None and form.scales is not None:
        assert (blocks.scales.min(), blocks.scales.max()) == (form.scales[0], form.scales[-1])


@pytest.mark.parametrize("name", FORMATS)
def test_sizes_are_those_of_the_table(name):
    form, kind = FORMATS[name], tensor_type(name)
    assert form.block == kind.block_elements
    assert pack(form, unpack(form, quantize_rows(name, weights(), None))).shape == (12, row_bytes(kind, N))


def test_other_formats_are_refused_by_name():
    with pytest.raises(QuantizeError, match=r"'IQ2_XS' is not a format .*known: Q4_0, .*Q6_K"):
        block_format("IQ2_XS")


def test_bytes_that_are_no_whole_blocks_are_refused():
    with pytest.raises(QuantizeError, match=r"Q4_0 rows are whole blocks of 18 bytes, not \(2, 17\) uint8"):
        unpack(FORMATS["Q4_0"], np.zeros((2, 17), np.uint8))
    with pytest.raises(QuantizeError, match=r"blocks of 256 weights, and rows of 32"):
        pack(FORMATS["Q4_K"], Blocks(np.zeros((1, 32), np.uint8), np.zeros((1, 1), np.float16)))


def test_integer_scales_that_are_missing_are_told():
    blocks = unpack(FORMATS["Q6_K"], quantize_rows("Q6_K", weights(), None))
    with pytest.raises(QuantizeError, match="integer scales"):
        pack(FORMATS["Q6_K"], Blocks(blocks.codes, blocks.scale))
