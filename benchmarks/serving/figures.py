"""Figures of one round: what the outcomes of its requests say together."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from benchmarks.serving.client import Outcome
from benchmarks.serving.load import Round

Values = Mapping[
    str, float | None
]  # figure -> value; None: this round has none, as with nothing but failures


@dataclass(frozen=True, slots=True)
class Figure:
    """How a figure is named and written, and whether rounds give their median or their worst."""

    label: str
    unit: str
    digits: int = 1
    over_rounds: Literal["median", "worst"] = "median"


FIGURES = {
    "tokens_per_s": Figure("throughput", "tokens/s"),
    "stream_tokens_per_s": Figure("each stream after its first token", "tokens/s"),
    "ttft_p50_s": Figure("time to first token, median", "s", 3),
    "ttft_p95_s": Figure("time to first token, 95 %", "s", 3),
    "later_ttft_p50_s": Figure("time to first token of later turns, median", "s", 3),
    "long_ttft_s": Figure("the long prompt's time to first token", "s", 3),
    "gap_s": Figure("longest gap of a running stream", "s", 3),
    "others_tokens_per_s": Figure("throughput of those who stay", "tokens/s"),
    "step_s": Figure("time between their chunks, median", "s", 3),
    "freed_s": Figure("until those who left are let go", "s", 3),
    "freed_steps": Figure("steps until then, the running one included", "steps"),
    "unchanged": Figure("throughput of those who stay from then on, of that without the others", "×", 2),
    "cached_share": Figure("prompt tokens from the cache", "of 1", 2),
    "failed": Figure("failed requests, worst round", "", 0, "worst"),
    "requests": Figure("requests a round", "", 0),
    "differing": Figure("texts other than those alone, worst round", "", 0, "worst"),
    "unexcused": Figure("of them where the two best were 0.05 or more apart", "", 0, "worst"),
    "parting_gap": Figure("farthest apart of these", "logits", 3, "worst"),
    "unlike_again": Figure("texts of 8 that differ when asked alone twice", "", 0, "worst"),
    "tokens_ratio": Figure("tokens of the first key for one of the second", "", 2),
    "off_weights": Figure("off the ratio of their weights", "%"),
    "single_ttft_s": Figure("time to first token beside the flood, 95 %", "s", 3),
    "alone_ttft_s": Figure("the same without a flood", "s", 3),
    "ttft_of_alone": Figure("the one of the other", "×", 2),
    "peak_mb": Figure("most memory of all processes", "MB", 0),
    "beyond_budget_mb": Figure("of it beyond weights, KV cache and caches", "MB", 0),
    "growth_mb": Figure("growth in the second half of the requests", "MB"),
    "cache_growth_mb": Figure("of it prefixes kept within their budget", "MB"),
    "leak_mb": Figure("of it what they do not explain", "MB"),
    "load_cpu_s": Figure("processor time of the load generator", "s", 2),
}


COUNTS = ("failed", "requests", "load_cpu_s")


def everyday(result: Round) -> dict[str, float | None]:
    """The figures that every scenario has."""
    outcomes = result.outcomes
    complete = [each for each in outcomes if each.complete]
    firsts = [each.ttft_s for each in complete if each.ttft_s is not None]
    return {
        "tokens_per_s": throughput(outcomes),
        "stream_tokens_per_s": middle(stream_rate(each) for each in complete),
        "ttft_p50_s": percentile(firsts, 0.5),
        "ttft_p95_s": percentile(firsts, 0.95),
        "gap_s": longest([gap for each in outcomes for gap in gaps(each)]),
        "cached_share": cached_share(complete),
        "failed": float(sum(each.failure is not None for each in outcomes)),
        "requests": float(len(outcomes)),
        "load_cpu_s": result.load_cpu_s,
    }


def conversations(result: Round) -> dict[str, float | None]:
    """And the time to first token of all turns but the first."""
    later = [each.ttft_s for each in result.outcomes if each.complete and each.turn > 0]
    return everyday(result) | {"later_ttft_p50_s": middle(later)}


Evaluate = Callable[[Round], dict[str, float | None]]


def throughput(outcomes: Sequence[Outcome]) -> float | None:
    """Tokens of answered requests by the time from the first request to the last end; failures add time and
    no tokens."""
    tokens = sum(each.completion_tokens or 0 for each in outcomes if each.complete)
    asked = [each for each in outcomes if each.failure != "skipped"]
    if not tokens:
        return None
    return tokens / (max(each.ended_s for each in asked) - min(each.sent_s for each in asked))


def stream_rate(outcome: Outcome) -> float | None:
    """Tokens after the first chunk by the time after it: as a reader sees it. A first chunk is one token,
    since no server holds it back."""
    written = (outcome.completion_tokens or 0) - 1
    elapsed = outcome.stamps[-1] - outcome.stamps[0] if outcome.stamps else 0.0
    return written / elapsed if written > 0 and elapsed > 0 else None


def gaps(outcome: Outcome, *, since_s: float = 0.0, until_s: float = float("inf")) -> list[float]:
    """Seconds between chunks, of those pairs that lie in a window at least in part.

    A stream that was left or failed was silent from its last chunk to its end, which counts too."""
    stamps = outcome.stamps
    if stamps and not outcome.complete:
        stamps = [*stamps, outcome.ended_s]
    pairs = itertools.pairwise(stamps)
    return [late - early for early, late in pairs if late > since_s and early < until_s]


def first_or_end(outcome: Outcome) -> float:
    """When a request had its first text, or ended without."""
    return outcome.stamps[0] if outcome.stamps else outcome.ended_s


def cached_share(outcomes: Sequence[Outcome]) -> float | None:
    """Of the prompt tokens, how many were not computed; None where the server does not tell."""
    told = [each for each in outcomes if each.cached_tokens is not None and each.prompt_tokens]
    total = sum(each.prompt_tokens or 0 for each in told)
    return sum(each.cached_tokens or 0 for each in told) / total if total else None


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def middle(values: Iterable[float | None]) -> float | None:
    """The median of those that are there."""
    there = [value for value in values if value is not None]
    return median(there) if there else None


def longest(values: Sequence[float]) -> float | None:
    """The largest, if any."""
    return max(values, default=None)
