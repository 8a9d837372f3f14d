"""Our kernels for Q4_K, Q5_K, Q6_K give each row the bits that llama.cpp gives it alone, beside any others.

llama.cpp's own results of several rows are no measure: it adds up those in another order.
"""

from dataclasses import replace

import numpy as np
import pytest

from engine.kernels import calls, library_path, min_rows
from tests.engine.ggml_graph import Weights

pytestmark = pytest.mark.skipif(
    not library_path().is_file() or calls("matmul") < 0,
    reason="lq was installed without a C++ compiler, or this CPU has no AVX2: no kernel",
)
N_ROWS = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 40, 130)  # at and around a pass of 16, and many
BLOCK = 256


def with_minima(scale: np.ndarray, minimum: np.ndarray, scales: np.ndarray, quants: np.ndarray) -> np.ndarray:
    """Blocks: (columns, blocks) scales, (columns, blocks, 12) and (columns, blocks, 128 or 160) bytes."""
    halves = np.stack([scale, minimum], axis=-1).astype(np.float16).view(np.uint8)
    return np.concatenate([halves, scales, quants], axis=-1, dtype=np.uint8)


def q6_k(scale: np.ndarray, minimum: np.ndarray, scales: np.ndarray, quants: np.ndarray) -> np.ndarray:  # noqa: ARG001
    """Blocks: (columns, blocks) scales, (columns, blocks, 16) and (columns, blocks, 192) bytes."""
    halves = scale.astype(np.float16)[..., None].view(np.uint8)
    return np.concatenate([quants, scales, halves], axis=-1, dtype=np.uint8)


# ggml_type, encoder, bytes of scales and of quants, repacked, columns
TYPES = {
    "Q4_K": (12, with_minima, 12, 128, True, 40),
    "Q5_K": (13, with_minima, 12, 160, False, 13),
    "Q6_K": (14, q6_k, 16, 192, False, 13),
}
FILLS = {  # scale, minimum, byte of the scales, byte of the quants; None: any
    "any": (None, None, None, None),
    "largest": (60_000, 60_000, 0xFF, 0xFF),  # Q6_K: scales are -1
    "largest scales, no minimum": (1, 0, 0x7F, 0xFF),  # Q6_K: 127 times 63 - 32
    "smallest scales": (1, 1, 0x80, 0xFF),  # Q6_K: -128
    "smallest quants": (1, 1, 0x80, 0),
    "negative": (-3, -0.5, None, None),
    "tiny": (6e-8, 6e-8, None, None),
    "nothing": (0, 0, 0, 0),
}


def weights_of(kind: str, fill: str, n_blocks: int) -> Weights:
    type, encode, n_scales, n_quants, repacked, n_columns = TYPES[kind]
    scale, minimum, scales, quants = FILLS[fill]
    random = np.random.default_rng(len(fill))
    shape = (n_columns, n_blocks)

    def bytes_of(value: int | None, n: int) -> np.ndarray:
        any = random.integers(256, size=(*shape, n), dtype=np.uint8)
        return any if value is None else np.full_like(any, value)

    def floats_of(value: float | None) -> np.ndarray:
        return random.normal(size=shape) if value is None else np.full(shape, value)

    blocks = encode(
        floats_of(scale), floats_of(minimum), bytes_of(scales, n_scales), bytes_of(quants, n_quants)
    )
    return Weights(type, n_blocks * BLOCK, blocks.reshape(n_columns, -1), repacked)


def rows_of(n_rows: int, length: int) -> np.ndarray:
    """Activations with the cases that matter among the first ones, some of each in every number of rows."""
    random = np.random.default_rng(n_rows)
    rows = random.normal(size=(n_rows, length)).astype(np.float32)
    cases = [
        np.full(length, 3.0),  # all as large as can be, of one sign
        np.zeros(length),
        np.full(length, -1e-3),
        np.where(np.arange(length) % 2, 1.0, -1.0),  # the largest of both signs
        np.where(np.arange(length) % BLOCK == 77, 1e4, 1.0),  # one large among small
        np.where(np.arange(length) < BLOCK, 0.0, rows[0]),  # one block of nothing
        np.where(np.arange(length) % BLOCK, random.integers(-127, 127, length) + 0.5, 127),  # all halfway
        np.full(length, 1e-39),
    ]
    for at, case in enumerate(cases[: n_rows // 2]):
        rows[at * 2 % n_rows if n_rows > 2 else n_rows // 3] = case
    return rows


@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("kind", TYPES)
def test_every_row_gets_the_bits_that_llama_cpp_gives_it_alone(
    our_matmul, their_matmul, kind, fill, n_threads
):
    n_blocks = 1 + n_threads
    weights = weights_of(kind, fill, n_blocks)
    groups = [rows_of(n, weights.length) for n in N_ROWS]
    groups += [row[None] for row in rows_of(16, weights.length)[::2]]  # each case as a single row
    results = our_matmul.compute(weights, groups, n_threads)
    assert our_matmul.taken == sum(len(rows) >= min_rows() for rows in groups)
    alone = their_matmul.compute(weights, [row[None] for rows in groups for row in rows], n_threads)
    assert their_matmul.taken == 0
    expected = np.concatenate(alone)
    assert np.isfinite(expected).all()
    assert (fill == "nothing") == (not expected.any())
    for rows, result in zip(groups, results, strict=True):
        first, expected = expected[: len(rows)], expected[len(rows) :]
        assert np.array_equal(result.view(np.int32), first.view(np.int32)), (
            f"{len(rows)} rows: {np.abs(result - first).max()}"
        )


def test_another_layout_stays_with_llama_cpp(our_matmul, their_matmul):
    """Q4_K as it is in the file: so it stays when the number of columns is no multiple of 8."""
    weights = replace(weights_of("Q4_K", "any", 2), repacked=False)
    rows = [rows_of(4, weights.length)]
    assert np.array_equal(our_matmul.compute(weights, rows), their_matmul.compute(weights, rows))
    assert our_matmul.taken == 0
