"""Contexts whose calls give one result a sequence, and such a call: texts in, rows of numbers out."""

from collections.abc import Sequence

import numpy as np

from engine.llama import Context, Model
from engine.request import EngineConfig, Pooling


def open_context(model: Model, config: EngineConfig, pooling: Pooling, n_ctx: int) -> Context:
    """An encoder takes a text whole, so that its call holds the longest; who reads on needs shorter ones."""
    room = max(n_ctx, config.n_batch, config.n_parallel)

    def opened(n_batch: int, n_outputs_max: int | None) -> Context:
        return Context.open(
            model,
            n_ctx=room,
            n_batch=n_batch,
            n_seq_max=config.n_parallel,
            n_outputs_max=n_outputs_max,
            n_threads=config.n_threads,
            unified=True,
            pooling=pooling,
        )

    n_part = max(config.n_batch, config.n_parallel)
    context = opened(n_part, config.n_parallel)
    if goes_on(context, pooling):
        return context
    context.close()
    return opened(room, None)


def goes_on(context: Context, pooling: Pooling) -> bool:
    """Whether a text may be read in parts: its tokens look back only, and the result is the last one's."""
    return context.is_causal and pooling in ("last", "rank")


def pool(context: Context, texts: Sequence[Sequence[int]], width: int, *, goes_on: bool) -> list[np.ndarray]:
    """One (width,) float32 row for each text, all computed from an empty memory. Raises DecodeFailed.

    An encoder, where every token looks at all others, takes the texts in one call. Where a text `goes_on`
    from what was read, only its last token is pooled: the vocabulary's matrix, a large part of a small model,
    is not computed for the others.
    """
    context.clear()
    context.batch.clear()
    starts = [len(text) - 1 if goes_on else 0 for text in texts]
    if goes_on:
        context.pool(False)
        for sequence, (text, end) in enumerate(zip(texts, starts, strict=True)):
            _read(context, text[:end], sequence)
        _call(context)
    for sequence, (text, start) in enumerate(zip(texts, starts, strict=True)):
        context.batch.extend(text[start:], start=start, sequence=sequence, output=True)
    context.batch.want(np.arange(len(context.batch)))
    context.pool(True)
    context.decode()
    return [context.pooled(sequence, width) for sequence in range(len(texts))]


def _read(context: Context, tokens: Sequence[int], sequence: int) -> None:
    """Add tokens to the batch, which is computed whenever it is full."""
    start = 0
    while start < len(tokens):
        part = tokens[start : start + context.n_batch - len(context.batch)]
        context.batch.extend(part, start=start, sequence=sequence, output=False)
        start += len(part)
        if len(context.batch) == context.n_batch:
            _call(context)


def _call(context: Context) -> None:
    if len(context.batch):
        context.decode()
        context.batch.clear()


def normalised(row: np.ndarray) -> np.ndarray:
    """The same direction with length 1; zeros stay zeros."""
    length = np.linalg.norm(row)
    return row / length if length > 0 else row
