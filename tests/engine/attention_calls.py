"""Calls of attention for the tests of its kernel: random ones, parts of them, and what they should give.

Numpy alone; ggml_graph.py computes the same calls through ggml.
"""

import random
from dataclasses import dataclass, replace

import numpy as np

F32, F16, Q4_0, Q8_0, BF16 = 0, 1, 2, 8, 30  # ggml_type
BLOCKED = np.float16(-np.inf)


@dataclass(frozen=True)
class Call:
    """What attention is computed of; arrays in the order in which llama.cpp keeps them."""

    q: np.ndarray  # (streams, queries, heads, dk) float32
    k: np.ndarray  # (streams, cells, key heads, dk) float16; float32 when k_type is not F16
    v: np.ndarray  # (streams, cells, key heads, dv) alike
    #: (streams or 1, queries, cells) float16, or (streams or 1, heads, queries, cells)
    mask: np.ndarray | None = None
    sinks: np.ndarray | None = None  # (heads,) float32
    scale: float = 1.0
    max_bias: float = 0.0
    softcap: float = 0.0
    k_type: int = F16
    v_type: int = F16

    @property
    def seen(self) -> np.ndarray:
        """Which cells a query sees: (streams or 1, queries, cells)."""
        assert self.mask is not None
        return self.mask != BLOCKED


def part(call: Call, streams: slice, queries: slice) -> Call:
    """The same call with fewer of both."""
    return replace(
        call,
        q=call.q[streams, queries],
        k=call.k[streams],
        v=call.v[streams],
        mask=None if call.mask is None else call.mask[streams, queries],
    )


def scattered(call: Call, n_cells: int, seed: int = 0) -> Call:
    """The same call in a memory of so many cells, each anywhere; nobody's cells hold large numbers."""
    draw = np.random.default_rng(seed)
    assert call.mask is not None
    place = draw.permutation(n_cells)[: call.k.shape[1]]
    k, v = (np.full((len(each), n_cells, *each.shape[2:]), 60000, np.float16) for each in (call.k, call.v))
    mask = np.full((*call.mask.shape[:-1], n_cells), BLOCKED)
    k[:, place], v[:, place], mask[..., place] = call.k, call.v, call.mask
    return replace(call, k=k, v=v, mask=mask)


@dataclass(frozen=True)
class Shape:
    """What a random call looks like."""

    group: int = 3
    dk: int = 64
    dv: int = 64
    cells: int = 768
    queries: int = 17
    streams: int = 1
    mask: str = "causal"
    n_kv_heads: int = 2
    seed: int = 0

    def __str__(self) -> str:
        return (
            f"{self.n_kv_heads}x{self.group}-{self.dk}:{self.dv}-{self.queries}q{self.cells}c"
            f"x{self.streams}-{self.mask}"
        )

    def call(self, **options) -> Call:
        """Random numbers of order 1."""
        draw = np.random.default_rng(self.seed)
        n_heads = self.n_kv_heads * self.group
        mask = MASKS[self.mask](draw, self.streams, self.queries, self.cells)
        return Call(
            q=draw.standard_normal((self.streams, self.queries, n_heads, self.dk), np.float32),
            k=draw.standard_normal((self.streams, self.cells, self.n_kv_heads, self.dk)).astype(np.float16),
            v=draw.standard_normal((self.streams, self.cells, self.n_kv_heads, self.dv)).astype(np.float16),
            mask=mask,
            **{"scale": self.dk**-0.5, **options},
        )


def visible(seen: np.ndarray) -> np.ndarray:
    """A mask of what is seen."""
    return np.where(seen, np.float16(0), BLOCKED)


def causal(draw: np.random.Generator, streams: int, queries: int, cells: int) -> np.ndarray:
    """Tokens at the end of a text that fills a part of the cells; llama.cpp pads the rest."""
    used = draw.integers(min(queries, cells), cells + 1, (streams, 1, 1))
    position = used - queries + np.arange(queries)[None, :, None]
    return visible(np.arange(cells) <= np.maximum(position, 0))


def holes(draw: np.random.Generator, streams: int, queries: int, cells: int) -> np.ndarray:
    """A unified cache: runs of cells of three sequences, and of nobody; each query sees those of its own."""
    length = draw.integers(1, 80, cells)
    owner = np.repeat(draw.integers(0, 4, cells), length)[:cells]
    sequence = draw.integers(0, 3, (streams, queries, 1))
    seen = (owner == sequence) & (np.arange(cells) <= draw.integers(cells // 2, cells, (streams, queries, 1)))
    seen[:, :, 0] |= ~seen.any(axis=2)  # each token sees at least itself
    return visible(seen)


def blind(draw: np.random.Generator, streams: int, queries: int, cells: int) -> np.ndarray:
    """Holes, and some rows that see nothing at all: the first, the last, a third of the others."""
    mask = holes(draw, streams, queries, cells)
    unseeing = draw.random((streams, queries)) < 1 / 3
    unseeing[:, [0, -1]] = True
    mask[unseeing] = BLOCKED
    return mask


MASKS = {"causal": causal, "holes": holes, "blind": blind, "open": lambda *_: None}


def mixtures(n: int) -> list[tuple[Shape, int]]:
    """Shapes and numbers of threads: each axis takes its values equally often, in an order of its own."""
    axes = {
        "group": (1, 3, 7, 8),
        "dims": ((64, 64), (80, 80), (128, 128), (256, 256), (192, 128), (64, 128), (72, 40)),
        "cells": (256, 768, 2048, 264, 1000),
        "queries": (1, 2, 17, 64, 300),
        "streams": (1, 3),
        "mask": tuple(MASKS),
        "threads": (1, 2, 3),
    }
    order = random.Random(7)
    columns = {}
    for name, values in axes.items():
        columns[name] = [values[i % len(values)] for i in range(n)]
        order.shuffle(columns[name])
    found = []
    for seed in range(n):
        row = {name: column[seed] for name, column in columns.items()}
        (dk, dv), threads = row.pop("dims"), row.pop("threads")
        found.append((Shape(dk=dk, dv=dv, seed=seed, **row), threads))
    return found


def expected(call: Call) -> np.ndarray:
    """Attention by its definition, in float64."""
    n_streams, _, n_heads, _ = call.q.shape
    group = n_heads // call.k.shape[2]
    results = np.empty((*call.q.shape[:3], call.v.shape[-1]))
    for stream in range(n_streams):
        for head in range(n_heads):
            keys, values = (x[stream, :, head // group].astype(np.float64) for x in (call.k, call.v))
            scores = call.q[stream, :, head].astype(np.float64) @ keys.T * np.float32(call.scale)
            if call.softcap:
                scores = call.softcap * np.tanh(scores / call.softcap)
            if call.mask is not None:
                mask = call.mask if call.mask.ndim == 4 else call.mask[:, None]
                rows = mask[stream % mask.shape[0], head % mask.shape[1]].astype(np.float64)
                scores = scores + alibi_slope(head, n_heads, call.max_bias) * rows
            if call.sinks is not None:
                sink = np.full((len(scores), 1), call.sinks[head], np.float64)
                scores, values = np.hstack([scores, sink]), np.vstack([values, np.zeros_like(values[:1])])
            results[stream, :, head] = _softmax(scores) @ values
    return results


def _softmax(scores: np.ndarray) -> np.ndarray:
    """Row by row; a row that sees nothing has no weights."""
    highest = scores.max(axis=1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(highest), highest, 0))
    total = weights.sum(axis=1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


def alibi_slope(head: int, n_heads: int, max_bias: float) -> float:
    """How much a head minds distance, as the ALiBi paper has it for any number of heads."""
    if max_bias == 0:
        return 1.0
    n = 1 << (n_heads.bit_length() - 1)
    if head < n:
        return 2.0 ** (-max_bias * (head + 1) / n)
    return 2.0 ** (-max_bias / 2 * (2 * (head - n) + 1) / n)
