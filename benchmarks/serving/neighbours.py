"""Figures of what some clients' requests do to others': of one round, or of it and the same without them."""

from collections.abc import Mapping, Sequence

from benchmarks.serving.client import Outcome
from benchmarks.serving.figures import COUNTS, everyday, first_or_end, gaps, longest, middle, percentile
from benchmarks.serving.load import Round
from benchmarks.serving.progress import moment, rate, written


def of_group(result: Round, group: str) -> list[Outcome]:
    """The outcomes of one group."""
    return [each for each in result.outcomes if each.group == group]


def counts(result: Round) -> dict[str, float | None]:
    """Figures that are of all clients whatever the others are of; failures of both rounds count."""
    own = everyday(result)
    kept = {name: own[name] for name in COUNTS}
    if result.without:
        kept["failed"] = (kept["failed"] or 0.0) + (everyday(result.without)["failed"] or 0.0)
    return kept


def beside_long(result: Round) -> dict[str, float | None]:
    """The long prompt's wait, and the longest gap of the streams within it."""
    (long,) = of_group(result, "long")
    until_s = first_or_end(long)
    streams = of_group(result, "streams")
    within = [gap for each in streams for gap in gaps(each, since_s=long.sent_s, until_s=until_s)]
    return counts(result) | {"long_ttft_s": long.ttft_s, "gap_s": longest(within)}


def those_who_stay(result: Round) -> dict[str, float | None]:
    """The figures of the clients that stay, how soon the others are let go, and how fast those who stay go
    on then, of how fast they are from the same place on where nobody else ever came."""
    stay = of_group(result, "stay")
    own = everyday(Round(stay))
    return (
        counts(result)
        | {name: own[name] for name in ("ttft_p95_s", "gap_s")}
        | {
            "others_tokens_per_s": own["tokens_per_s"],
            "step_s": middle(gap for each in stay for gap in gaps(each)),
            "freed_s": result.freed_s,
            "freed_steps": steps_until_freed(result, stay),
            "unchanged": unchanged(result, stay),
        }
    )


def left_s(result: Round) -> float | None:
    """When the last of those who left hung up; None when nobody did."""
    return max((each.ended_s for each in of_group(result, "leave") if each.left), default=None)


def steps_until_freed(result: Round, stay: Sequence[Outcome]) -> float | None:
    """Chunks that those who stay got from the last departure until the server was seen to have let go, as a
    step of the server gives each of them one: 1 is the step that ran when the clients left."""
    since_s = left_s(result)
    if since_s is None or result.freed_s is None:
        return None
    until_s = since_s + result.freed_s
    return middle(float(sum(since_s < stamp <= until_s for stamp in each.stamps)) for each in stay)


def unchanged(result: Round, stay: Sequence[Outcome]) -> float | None:
    """The rate after the departures, of that in the round without them: from where they had written as much
    on, and until the first has its answer, so that as many write at the same length in both."""
    since_s = left_s(result)
    if since_s is None or result.freed_s is None or result.without is None:
        return None
    free_s = since_s + result.freed_s
    others = of_group(result.without, "stay")
    same_s = moment(others, written(stay, until_s=free_s))
    if same_s is None:
        return None
    ours = rate(stay, since_s=free_s, until_s=first_end(stay))
    theirs = rate(others, since_s=same_s, until_s=first_end(others))
    return ours / theirs if ours and theirs else None


def first_end(outcomes: Sequence[Outcome]) -> float:
    """When the first of them was over."""
    return min((each.ended_s for each in outcomes), default=0.0)


def by_weight(result: Round, weights: Mapping[str, float]) -> dict[str, float | None]:
    """How many tokens the first key gets for one of the second's while every client wants more. Requests are
    of one size for both, so that those written stand for those read."""
    ours, theirs = ([each for each in result.outcomes if each.group == key] for key in weights)
    since_s, until_s = saturated(result.outcomes, first=next(iter(weights)))
    usual = [written(each, since_s=since_s, until_s=until_s) for each in (ours, theirs)]
    ratio = usual[0] / usual[1] if until_s > since_s and usual[1] else None
    first, second = weights.values()
    off = abs(ratio * second / first - 1) * 100 if ratio is not None else None
    return everyday(result) | {"tokens_ratio": ratio, "off_weights": off}


def saturated(outcomes: Sequence[Outcome], *, first: str) -> tuple[float, float]:
    """From when every client has asked until one of the first key is through all its turns."""
    clients: dict[int, list[Outcome]] = {}
    for each in outcomes:
        clients.setdefault(each.client, []).append(each)
    since_s = max((turns[0].sent_s for turns in clients.values()), default=0.0)
    ends = [turns[-1].ended_s for turns in clients.values() if turns[0].group == first]
    return since_s, min(ends, default=0.0)


def beside_flood(result: Round) -> dict[str, float | None]:
    """The single requests' waits, of what they are when nobody floods the server."""
    beside = _waits(of_group(result, "single"))
    alone = _waits(of_group(result.without, "single")) if result.without else None
    return counts(result) | {
        "single_ttft_s": beside,
        "alone_ttft_s": alone,
        "ttft_of_alone": beside / alone if beside and alone else None,
    }


def _waits(outcomes: Sequence[Outcome]) -> float | None:
    firsts = [each.ttft_s for each in outcomes if each.complete and each.ttft_s is not None]
    return percentile(firsts, 0.95)
