"""Which sequences are held out, and which are learnt from together in which order. Pure.

Everything follows from the seed and the position, so that a run that is taken up again goes on as it would
have.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from quantize.errors import QuantizeError


class TooFewChats(QuantizeError):
    """Nothing would be left to learn from or to measure on."""

    def __init__(self, n_distinct: int) -> None:
        super().__init__(
            f"--data holds {n_distinct} different chat{'' if n_distinct == 1 else 's'}, and --held-out keeps "
            "some back for measuring; give more chats, or --held-out 0 to measure nothing"
        )


def held_out(texts: Sequence[str], *, share: float, seed: int) -> frozenset[int]:
    """Indexes of the chats that are only measured on; equal texts go to the same side.

    At least one where `share` is above 0. Raises TooFewChats where none would be left to learn from.
    """
    if share == 0:
        return frozenset()
    same: dict[str, list[int]] = {}
    for index, text in enumerate(texts):
        same.setdefault(text, []).append(index)
    groups = sorted(same, key=lambda text: hashlib.sha256(f"{seed}\0{text}".encode()).digest())
    if len(groups) < 2:
        raise TooFewChats(len(groups))
    n = min(max(1, round(share * len(groups))), len(groups) - 1)
    return frozenset(index for text in groups[:n] for index in same[text])


def steps(n: int, *, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The sequences of each step of an epoch: all `n` once, in an order of that epoch's own."""
    order = np.random.default_rng([seed, epoch]).permutation(n).tolist()
    return [order[first : first + batch_size] for first in range(0, n, batch_size)]


def micro_batches(lengths: Sequence[int], chosen: Sequence[int], *, limit: int) -> list[list[int]]:
    """The chosen sequences, by length, in batches that hold at most `limit` tokens with their padding.

    One that is longer than that is a batch of its own.
    """
    batches: list[list[int]] = []
    for index in sorted(chosen, key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= limit:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def learning_rate(step: int, *, n_steps: int, n_warm: int, peak: float) -> float:
    """Of step 0, 1, …: rising over `n_warm` steps, then a half cosine down to nothing after the last."""
    if step < n_warm:
        return peak * (step + 1) / (n_warm + 1)
    return peak * 0.5 * (1 + float(np.cos(np.pi * (step - n_warm) / max(1, n_steps - n_warm))))
