"""Our attention kernel: right, the same bits whatever is beside a token, and only where it can be."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from tests.engine.attention_calls import (
    BF16,
    BLOCKED,
    F32,
    Q4_0,
    Q8_0,
    Call,
    Shape,
    causal,
    expected,
    mixtures,
    part,
    scattered,
    visible,
)
from tests.engine.ggml_graph import AttentionProcess, kernel_library

pytestmark = pytest.mark.skipif(
    not kernel_library().is_file(), reason="lq was installed without a C++ compiler: no kernel"
)
TOLERANCE = 1e-5  # of values of order 1; llama.cpp's own sums in 16 bits are off by 2e-3


@pytest.fixture(scope="module", params=[False, True], ids=["32 bits", "64 bits"])
def kernel(request: pytest.FixtureRequest) -> Iterator[AttentionProcess]:
    """A process that computes with the kernel, and sums in so many bits."""
    with AttentionProcess(with_kernel=True, wide=request.param) as process:
        yield process


@pytest.fixture(scope="module")
def wide() -> Iterator[AttentionProcess]:
    """A process that computes with the kernel, and sums in 64 bits."""
    with AttentionProcess(with_kernel=True, wide=True) as process:
        yield process


@pytest.fixture(scope="module")
def bare() -> Iterator[AttentionProcess]:
    """A process with llama.cpp's own attention."""
    with AttentionProcess(with_kernel=False) as process:
        yield process


def close(got: np.ndarray, call: Call, tolerance: float = TOLERANCE) -> None:
    """Within the tolerance of the definition, everywhere."""
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, expected(call), rtol=tolerance, atol=tolerance)


def same_bits(a: np.ndarray, b: np.ndarray) -> None:
    """The same numbers to the last bit; NaN is no number."""
    assert np.isfinite(a).all()
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


# Against the definition


@pytest.mark.parametrize(("shape", "threads"), mixtures(40), ids=lambda x: f"{x}")
def test_any_shape_is_attention_by_its_definition(kernel: AttentionProcess, shape: Shape, threads: int):
    call = shape.call()
    close(kernel.compute(call, threads), call)
    assert kernel.taken == 1


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("queries", [1, 17])
def test_rows_that_see_nothing_are_zero(kernel: AttentionProcess, queries: int, threads: int):
    call = Shape(mask="blind", queries=queries).call()
    unseeing = np.all(~call.seen, axis=2)
    assert unseeing[:, 0].all()
    got = kernel.compute(call, threads)
    assert (got[unseeing] == 0).all()
    assert kernel.taken == 1


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("queries", [1, 17])
@pytest.mark.parametrize("mask", ["causal", "blind"])
def test_sinks_take_their_share(kernel: AttentionProcess, mask: str, queries: int, threads: int):
    shape = Shape(mask=mask, queries=queries)
    sinks = np.array([0, 1, -3, 8, -1000, 1000], np.float32)  # low and high, and so low or high that one wins
    close(kernel.compute(shape.call(sinks=sinks), threads), shape.call(sinks=sinks))
    assert kernel.taken == 1


@pytest.mark.parametrize("n_kv_heads", [1, 2, 8], ids="heads{}".format)  # of 3 heads each: 3, 6, 24
@pytest.mark.parametrize(("queries", "threads"), [(1, 1), (1, 2), (17, 2)])
def test_alibi_minds_distance_by_head(kernel: AttentionProcess, n_kv_heads: int, queries: int, threads: int):
    call = Shape(n_kv_heads=n_kv_heads, queries=queries, cells=512).call(max_bias=8.0)
    position = call.seen.sum(axis=2, keepdims=True) - 1
    distance = (np.arange(512) - position).astype(np.float16)
    call = replace(call, mask=np.where(call.seen, distance, BLOCKED))
    close(kernel.compute(call, threads), call)
    assert kernel.taken == 1


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("softcap", "factor"), [(50.0, 1), (2.0, 1), (30.0, 100)])
def test_softcap_holds_scores_down(kernel: AttentionProcess, softcap: float, factor: float, threads: int):
    shape = Shape(dk=128, dv=128, mask="holes")
    call = shape.call(softcap=softcap, scale=factor * 128**-0.5)
    close(kernel.compute(call, threads), call, TOLERANCE * factor)
    assert kernel.taken == 1


def test_one_mask_serves_all_streams(kernel: AttentionProcess):
    call = Shape(streams=3, mask="holes").call()
    call = replace(call, mask=visible(call.seen[:1]))
    close(kernel.compute(call, 2), call)
    assert kernel.taken == 1


def test_the_largest_group(kernel: AttentionProcess):
    call = Shape(group=48, n_kv_heads=1, queries=3).call()
    close(kernel.compute(call, 2), call)
    assert kernel.taken == 1


# The same bits


@pytest.fixture(scope="module", params=["causal", "holes"])
def crowd(request: pytest.FixtureRequest, kernel: AttentionProcess) -> tuple[Call, np.ndarray]:
    """Three streams of 50 queries in one call, and what they got: several blocks and segments."""
    shape = Shape(group=7, dk=80, dv=72, cells=1024, queries=50, streams=3, mask=request.param)
    call = shape.call()
    return call, kernel.compute(call, 1)


@pytest.mark.parametrize("threads", [2, 3, 4, 7])
def test_threads_change_no_bit(kernel: AttentionProcess, crowd: tuple[Call, np.ndarray], threads: int):
    call, together = crowd
    same_bits(kernel.compute(call, threads), together)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_a_token_alone_is_as_in_the_crowd(
    kernel: AttentionProcess, crowd: tuple[Call, np.ndarray], threads: int
):
    call, together = crowd
    for query in (0, 5, 6, 23, 48, 49):  # at both ends of blocks of 6, and in the last, shorter one
        for stream in range(3):
            here = slice(stream, stream + 1), slice(query, query + 1)
            same_bits(kernel.compute(part(call, *here), threads), together[here])


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "queries", [slice(0, 2), slice(7, 13), slice(3, 20), slice(49, 50), slice(0, 50)], ids=str
)
def test_some_tokens_are_as_in_the_crowd(
    kernel: AttentionProcess, crowd: tuple[Call, np.ndarray], queries: slice, threads: int
):
    call, together = crowd
    for streams in (slice(0, 1), slice(1, 3), slice(0, 3)):
        same_bits(kernel.compute(part(call, streams, queries), threads), together[streams, queries])


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize(("queries", "cells"), [(1, 256), (2, 256), (1, 768), (17, 256)])
def test_cells_behind_the_text_change_no_bit(
    kernel: AttentionProcess, queries: int, cells: int, threads: int
):
    """As when another sequence grows: n_kv rises, and with it the number of segments."""
    shape = Shape(queries=queries, cells=2048, mask="open")
    many = shape.call()
    mask = causal(np.random.default_rng(1), 1, queries, cells)
    wide = np.full((1, queries, 2048), BLOCKED)
    wide[:, :, :cells] = mask
    few = replace(many, k=many.k[:, :cells], v=many.v[:, :cells], mask=mask)
    same_bits(kernel.compute(replace(many, mask=wide), threads), kernel.compute(few, 1))


@pytest.mark.parametrize("softcap", [0.0, 20.0])
def test_other_heads_change_no_bit(kernel: AttentionProcess, softcap: float):
    call = Shape(group=8, queries=9, mask="holes").call(softcap=softcap)
    together = kernel.compute(call, 2)
    for head in (0, 3, 15):
        key = slice(head // 8, head // 8 + 1)
        alone = replace(call, q=call.q[:, :, head : head + 1], k=call.k[:, :, key], v=call.v[:, :, key])
        same_bits(kernel.compute(alone, 1)[:, :, 0], together[:, :, head])


@pytest.mark.parametrize("threads", [1, 2])
def test_sinks_and_alibi_alone_as_together(kernel: AttentionProcess, threads: int):
    sinks = np.linspace(-2, 2, 6, dtype=np.float32)
    call = Shape(queries=17, mask="holes").call(sinks=sinks, max_bias=8.0)
    call = replace(call, mask=np.where(call.seen, -np.arange(768)[::-1], BLOCKED).astype(np.float16))
    together = kernel.compute(call, 1)
    for query in (0, 15, 16):
        alone = part(call, slice(0, 1), slice(query, query + 1))
        same_bits(kernel.compute(alone, threads), together[:, query : query + 1])


def all_but_the_same(a: np.ndarray, b: np.ndarray) -> None:
    """The same bits, but for a number in some ten thousand, whose last bit may differ."""
    assert np.isfinite(a).all()
    apart = np.abs(a.view(np.int32).astype(np.int64) - b.view(np.int32))
    assert apart.max() <= 1
    assert np.count_nonzero(apart) <= a.size / 10_000


PLACES = {
    "plain": {},
    "softcap": {"softcap": 20.0},
    "sinks": {"sinks": np.linspace(-2, 2, 6, dtype=np.float32)},
    "steep": {"scale": 2.0},
}


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("queries", [1, 2, 17, 50])
@pytest.mark.parametrize("name", PLACES)
def test_where_cells_lie_changes_nothing(wide: AttentionProcess, name: str, queries: int, threads: int):
    """A memory that sequences share takes cells where there is room, and segments cut them otherwise."""
    call = Shape(queries=queries, cells=600).call(**PLACES[name])
    in_order = wide.compute(call, 1)
    assert wide.taken == 1
    for n_cells in (600, 2048):
        all_but_the_same(wide.compute(scattered(call, n_cells), threads), in_order)


@pytest.mark.parametrize("threads", [1, 2])
def test_where_cells_lie_changes_nothing_of_distances(wide: AttentionProcess, threads: int):
    call = Shape(queries=17, cells=600).call(max_bias=8.0)
    call = replace(call, mask=np.where(call.seen, -np.arange(600)[::-1], BLOCKED).astype(np.float16))
    all_but_the_same(wide.compute(scattered(call, 2048), threads), wide.compute(call, 1))


# What it leaves to llama.cpp

LEFT = {
    "q8_0": (Shape(), {"k_type": Q8_0, "v_type": Q8_0}, 0.02),
    "q4_0": (Shape(), {"k_type": Q4_0, "v_type": Q4_0}, 0.3),
    "q8_0 keys": (Shape(), {"k_type": Q8_0}, 0.02),
    "q8_0 values": (Shape(), {"v_type": Q8_0}, 0.02),
    "bf16": (Shape(), {"k_type": BF16, "v_type": BF16}, 0.02),
    "bf16 keys": (Shape(), {"k_type": BF16}, 0.02),
    "bf16 values": (Shape(), {"v_type": BF16}, 0.02),
    "f32": (Shape(), {"k_type": F32, "v_type": F32}, 0.01),
    "a group of 49": (Shape(group=49, n_kv_heads=1, queries=3), {}, 0.01),
}


@pytest.mark.parametrize("queries", [1, 17, 70])  # each another way through llama.cpp's own
@pytest.mark.parametrize("name", LEFT)
def test_what_it_does_not_compute_is_llama_cpps_own(
    kernel: AttentionProcess, bare: AttentionProcess, name: str, queries: int
):
    shape, options, tolerance = LEFT[name]
    call = replace(shape, queries=queries).call(**options)
    got = kernel.compute(call, 2)
    assert kernel.taken == 0
    close(got, call, tolerance)
    same_bits(got, bare.compute(call, 2))


@pytest.mark.parametrize("queries", [1, 17, 70])
def test_a_mask_a_head_is_minded(kernel: AttentionProcess, queries: int):
    call = Shape(queries=queries).call()
    draw = np.random.default_rng(2)
    masks = np.stack([causal(draw, 1, queries, 768) for _ in range(6)], axis=1)
    call = replace(call, mask=masks)
    close(kernel.compute(call, 2), call, 0.01)


@pytest.mark.parametrize("queries", [1, 17, 70])
@pytest.mark.parametrize(("cells", "dv"), [(35, 64), (261, 64), (256, 36)])
def test_odd_lengths_are_computed(kernel: AttentionProcess, cells: int, dv: int, queries: int):
    """As in a model of embeddings, whose cells are the tokens of the call."""
    call = Shape(queries=queries, cells=cells, dv=dv, mask="holes").call()
    close(kernel.compute(call, 2), call, 0.01)


@pytest.mark.parametrize("queries", [1, 17])
def test_the_reference_implementation_stays_llama_cpps(
    kernel: AttentionProcess, bare: AttentionProcess, queries: int
):
    call = Shape(queries=queries).call()
    got = kernel.compute(call, 2, reference=True)
    assert kernel.taken == 0
    same_bits(got, bare.compute(call, 2, reference=True))


def test_without_installing_llama_cpps_own_computes(kernel: AttentionProcess, bare: AttentionProcess):
    """The other tests compare with it: it must not be the kernel in disguise."""
    call = Shape().call()
    theirs = bare.compute(call, 2)
    assert bare.taken == 0
    assert np.abs(theirs - expected(call)).max() > np.abs(kernel.compute(call, 2) - expected(call)).max()


# Large numbers and stale ones


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("queries", [1, 17])
@pytest.mark.parametrize("sign", [1, -1, 0], ids=["high", "low", "both"])
def test_scores_of_a_thousand(kernel: AttentionProcess, sign: int, queries: int, threads: int):
    """Small integers, whose products are exact in 32 bits: the reference has the same scores."""
    call = Shape(queries=queries, mask="holes").call(scale=1.0)
    draw = np.random.default_rng(3)
    k = draw.integers(-3, 4, call.k.shape)
    q = draw.integers(-3, 4, call.q.shape)
    k[..., 0], q[..., 0] = 50, 20 * sign  # moves all scores by 1,000; with 0 they differ by up to 500
    if sign == 0:
        q *= 4  # standard deviation 130
        k[..., 1], q[..., 1] = draw.choice([-50, 50], k.shape[:-1]), 20
    call = replace(call, k=k.astype(np.float16), q=q.astype(np.float32))
    close(kernel.compute(call, threads), call)
    assert kernel.taken == 1


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("n_kv_heads", [1, 2])
def test_a_needle_is_found_wherever_it_lies(kernel: AttentionProcess, n_kv_heads: int, threads: int):
    """Each query asks for one key among keys of +-1: its score is 1,024, the next one about 500."""
    call = Shape(group=1, n_kv_heads=n_kv_heads, cells=520, queries=520, mask="open").call(scale=16.0)
    k = np.random.default_rng(4).choice([-1, 1], call.k.shape)
    call = replace(call, k=k.astype(np.float16), q=k.astype(np.float32))
    np.testing.assert_allclose(kernel.compute(call, threads), call.v.astype(np.float32), rtol=1e-6)
    for query in (7, 255, 256, 519):
        alone = part(call, slice(0, 1), slice(query, query + 1))
        np.testing.assert_allclose(
            kernel.compute(alone, threads)[:, 0], call.v[:, query].astype(np.float32), rtol=1e-6
        )


@pytest.mark.parametrize("threads", [1, 2])
def test_segments_a_thousand_apart(kernel: AttentionProcess, threads: int):
    """The highest score rises, falls and rises from one segment of cells to the next."""
    call = Shape(queries=1, cells=1536, mask="open").call(scale=1.0)
    q = np.zeros_like(call.q)
    q[..., 0] = 1
    k = np.zeros_like(call.k)
    k[..., 0] = np.repeat([-1000, 1000, -990, 995, 1001, 1000.5], 256)[None, :, None]
    call = replace(call, q=q, k=k)
    close(kernel.compute(call, threads), call)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("queries", [1, 2, 17, 64])
@pytest.mark.parametrize("mask", ["causal", "holes", "blind"])
def test_stale_cells_change_no_bit(kernel: AttentionProcess, mask: str, queries: int, threads: int):
    """What earlier sequences left in cells that nobody sees now: as large as 16 bits hold."""
    call = Shape(queries=queries, mask=mask).call()
    unseen = ~call.seen.any(axis=(0, 1))
    assert unseen.any()
    results = []
    for stale in (0, 65504, -65504, np.inf, -np.inf, np.nan):
        k, v = call.k.copy(), call.v.copy()
        k[:, unseen], v[:, unseen] = stale, stale
        results.append(kernel.compute(replace(call, k=k, v=v), threads))
    close(results[0], call)
    same_bits(results[0], results[1])
    same_bits(results[0], results[2])


@pytest.mark.parametrize("mask", ["causal", "holes"])
def test_what_another_token_sees_changes_no_bit(kernel: AttentionProcess, mask: str):
    """Large numbers in cells that one query sees leave those that do not see them alone."""
    call = Shape(queries=17, mask=mask).call()
    calm = kernel.compute(call, 2)
    large = call.seen[0, 16]
    others = ~call.seen[0][:, large].any(axis=1)
    if mask == "causal":  # only the last token's own cell is its alone
        large = large & ~call.seen[0, 15]
        others = np.arange(17) < 16
    assert large.any()
    assert others.any()
    k, v = call.k.copy(), call.v.copy()
    k[:, large], v[:, large] = 60000, -60000
    stirred = kernel.compute(replace(call, k=k, v=v), 2)
    same_bits(stirred[:, others], calm[:, others])
    assert (stirred[:, 16] != calm[:, 16]).any()
