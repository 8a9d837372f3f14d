"""Figures of what a server promises whatever the load is: the same texts, and no more memory than it may."""

from collections.abc import Callable, Sequence
from statistics import median

from benchmarks.serving.alone import partings, unlike
from benchmarks.serving.figures import everyday
from benchmarks.serving.footprint import Footprint, Sample
from benchmarks.serving.load import Round

#: In logits. Other sums give other last bits; two tokens as close as that are about as likely.
EXCUSED_GAP = 0.05
MEGABYTE = 1e6


def as_alone(result: Round) -> dict[str, float | None]:
    """How many texts are others than the same requests get alone, and whether that can be excused."""
    figures = everyday(result)
    if not result.alone:
        return figures
    found = partings(result.outcomes, result.alone)
    gaps = [each.gap for each in found]
    unexcused = sum(gap is None or gap >= EXCUSED_GAP for gap in gaps)
    widest = max((gap for gap in gaps if gap is not None), default=None)
    return figures | {
        "differing": float(len(found)),
        "unexcused": float(unexcused),
        "parting_gap": widest,
        "unlike_again": float(unlike(result.alone, result.again)),
    }


def memory(result: Round) -> dict[str, float | None]:
    """The most that the processes held together, beyond what they were granted, and growth in the second
    half of the requests. A cache that still fills up within its budget is no leak, so it is told apart."""
    figures, seen = everyday(result), result.footprint
    if seen is None or not seen.samples:
        return figures
    peak = max(each.held_bytes for each in seen.samples)
    beyond = None if seen.budget_bytes is None else (peak - seen.budget_bytes) / MEGABYTE
    grown = growth(seen, lambda sample: sample.held_bytes)
    kept = growth(seen, lambda sample: sample.cached_bytes)
    return figures | {
        "peak_mb": peak / MEGABYTE,
        "beyond_budget_mb": beyond,
        "growth_mb": grown,
        "cache_growth_mb": kept,
        "leak_mb": None if grown is None or kept is None else grown - kept,
    }


def growth(seen: Footprint, size: Callable[[Sample], int | None]) -> float | None:
    """Megabytes between the first and the last tenth of the second half of the requests, medians of each;
    None without a sample in both."""
    total = seen.samples[-1].n_ended
    early = _sizes(seen, size, 0.5 * total, 0.6 * total)
    late = _sizes(seen, size, 0.9 * total, total)
    return (median(late) - median(early)) / MEGABYTE if early and late else None


def _sizes(seen: Footprint, size: Callable[[Sample], int | None], least: float, most: float) -> Sequence[int]:
    within = [size(sample) for sample in seen.samples if least <= sample.n_ended <= most]
    return [each for each in within if each is not None]
