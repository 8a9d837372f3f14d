"""Which types of cached keys and values are measured together, and which pair to serve with.

Pure numbers: divergences and bytes in, pairs out. Knows no models and no files.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from engine.request import KVType

Pair = tuple[KVType, KVType]  # of keys, of values

#: What everything is measured against, and what the fast attention on the CPU reads.
EXACT: Pair = ("f16", "f16")
#: All that llama.cpp's cache can have below 16 bits, largest first.
TYPES: tuple[KVType, ...] = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
#: What a GPU has attention for as llama.cpp is usually built: keys and values alike, of one of these.
ON_GPU: tuple[Pair, ...] = (("q8_0", "q8_0"), ("q4_0", "q4_0"))
#: Measured whatever is predicted of them: `lq serve` takes them by itself where memory is short.
USUAL: tuple[Pair, ...] = ON_GPU
#: A cache may add so much of what rounding the weights has cost.
SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Measured:
    """One pair: bytes of a token over all layers; what it adds to the mean KLD from the source, with the
    error of this difference."""

    pair: Pair
    bytes_per_token: int
    added: float
    standard_error: float | None = None


def alone(types: Iterable[KVType] = TYPES) -> list[Pair]:
    """Each type for the keys with exact values, then for the values with exact keys."""
    kinds = tuple(types)
    return [*((kind, EXACT[1]) for kind in kinds), *((EXACT[0], kind) for kind in kinds)]


def promising(measured: Mapping[Pair, float], bytes_of: Callable[[Pair], int]) -> list[Pair]:
    """Pairs worth measuring together, largest first, from divergences of `alone`'s.

    Errors of keys and of values hardly meet, so the divergence of a pair is about the sum of the two (which
    measuring then checks). Pairs are left out that another beats by bytes and by this sum.
    """
    keys: dict[KVType, float] = {
        pair[0]: kl for pair, kl in measured.items() if pair[1] == EXACT[1] and pair[0] != EXACT[0]
    }
    values: dict[KVType, float] = {
        pair[1]: kl for pair, kl in measured.items() if pair[0] == EXACT[0] and pair[1] != EXACT[1]
    }
    predicted: dict[Pair, float] = {(k, v): keys[k] + values[v] for k in keys for v in values}
    order = sorted(predicted, key=lambda pair: (bytes_of(pair), predicted[pair]))
    found: list[Pair] = []
    least = float("inf")
    for pair in order:
        if predicted[pair] < least:
            found.append(pair)
            least = predicted[pair]
    found += [pair for pair in USUAL if pair in predicted and pair not in found]
    return sorted(found, key=lambda pair: -bytes_of(pair))


def recommend(
    measured: Sequence[Measured], limit: float, allowed: Sequence[Pair] | None = None
) -> Pair | None:
    """The smallest pair that adds no more than `limit`, one standard error included; None: stay with f16.

    Of equal ones the closest. `allowed`: pairs that run well here; None: all.
    """
    fitting = [
        one
        for one in measured
        if one.added + (one.standard_error or 0.0) <= limit and (allowed is None or one.pair in allowed)
    ]
    if not fitting:
        return None
    return min(fitting, key=lambda one: (one.bytes_per_token, one.added)).pair
