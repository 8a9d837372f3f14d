"""How far answers are at a moment of their round.

A server tells the number of tokens at the end only, and one chunk may hold several; characters are told at
once. So an answer's tokens are spread over its chunks by their characters; those of one that was left, whose
number nobody told, are reckoned from the other answers of the round.
"""

from collections.abc import Iterator, Sequence

from benchmarks.serving.client import Outcome


def arrived(outcomes: Sequence[Outcome]) -> list[tuple[float, float]]:
    """(when, tokens) of every chunk of all of them, in order of time."""
    usual = chars_per_token(outcomes)
    return sorted(chunk for each in outcomes for chunk in _chunks(each, usual))


def chars_per_token(outcomes: Sequence[Outcome]) -> float | None:
    """Of all that was answered to the end; None of nothing."""
    told = [each for each in outcomes if each.complete and each.completion_tokens]
    tokens = sum(each.completion_tokens or 0 for each in told)
    return sum(sum(each.sizes) for each in told) / tokens if tokens else None


def _chunks(outcome: Outcome, usual: float | None) -> Iterator[tuple[float, float]]:
    own = chars_per_token([outcome]) or usual
    for stamp, size in zip(outcome.stamps, outcome.sizes, strict=True):
        yield stamp, size / own if own else 0.0


def written(outcomes: Sequence[Outcome], *, since_s: float = 0.0, until_s: float) -> float:
    """Tokens that came after one moment and by another."""
    return sum(tokens for stamp, tokens in arrived(outcomes) if since_s < stamp <= until_s)


def rate(outcomes: Sequence[Outcome], *, since_s: float, until_s: float) -> float | None:
    """Tokens a second within a window; None of an empty one, or when nothing came in it."""
    tokens = written(outcomes, since_s=since_s, until_s=until_s)
    return tokens / (until_s - since_s) if until_s > since_s and tokens > 0 else None


def moment(outcomes: Sequence[Outcome], tokens: float) -> float | None:
    """When they had written so many tokens together; None when they never had."""
    total = 0.0
    for stamp, more in arrived(outcomes):
        total += more
        if total >= tokens:
            return stamp
    return None
