"""Which self-written turns are worth learning from: not empty, not looping, not seen before.

Works on token ids, so that it holds for every language. Small models need it: a fifth of what a 135M model
writes is dropped. Knows nothing of how turns are made.
"""

from collections.abc import Sequence

MIN_TOKENS = 3
#: A turn of at least LOOP_MIN tokens in which more than LOOP_SHARE of the 4-grams occurred before is a loop.
LOOP_MIN = 24
LOOP_SHARE = 0.4
#: Two user turns whose 3-gram sets overlap by more than this (Jaccard index) are the same question.
SAME_SHARE = 0.6


def fault(tokens: Sequence[int], text: str, *, ended: bool) -> str | None:
    """Why a turn is dropped: "endless", "empty", "repetitive"; None when it is good."""
    if not ended:
        return "endless"
    if len(tokens) < MIN_TOKENS or not text.strip():
        return "empty"
    if len(tokens) >= LOOP_MIN and repeated_share(tokens) > LOOP_SHARE:
        return "repetitive"
    return None


def repeated_share(tokens: Sequence[int], *, n: int = 4) -> float:
    """Share of the n-grams that occurred earlier in the same turn, 0..1."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


class Seen:
    """Turns already taken; answers whether a new one says the same. Costs the shared 3-grams only."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._holders: dict[tuple[int, ...], list[int]] = {}

    def add(self, tokens: Sequence[int]) -> None:
        """Take a turn."""
        shingles = _shingles(tokens)
        for shingle in shingles:
            self._holders.setdefault(shingle, []).append(len(self._sizes))
        self._sizes.append(len(shingles))

    def has(self, tokens: Sequence[int]) -> bool:
        """Whether a taken turn shares more than SAME_SHARE of its 3-grams with this one."""
        shingles = _shingles(tokens)
        shared: dict[int, int] = {}
        for shingle in shingles:
            for holder in self._holders.get(shingle, ()):
                shared[holder] = shared.get(holder, 0) + 1
        return any(n / (len(shingles) + self._sizes[holder] - n) > SAME_SHARE for holder, n in shared.items())


def _shingles(tokens: Sequence[int], *, n: int = 3) -> set[tuple[int, ...]]:
    """The set of n-grams; a shorter turn is one gram of its own."""
    if len(tokens) < n:
        return {tuple(tokens)}
    return {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}
