"""Rounds -> medians with quartiles, and ratios of paired rounds.

A round of each server follows the other's at once, so a machine that is slower for a minute meets both, and
the ratio of the pair hardly changes. The ratio that is reported is the median of the pairs' ratios, not the
ratio of the medians.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import quantiles

from benchmarks.serving.catalogue import Goal
from benchmarks.serving.figures import FIGURES, Values


@dataclass(frozen=True, slots=True)
class Spread:
    """Quartiles of some values."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """None of nothing; one value is its own quartiles."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0]) if values else None
        return cls(*quantiles(values, n=4, method="inclusive"))


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure of one scenario. `ours` and `theirs` over all rounds, `ratio` over the pairs."""

    figure: str
    ours: Spread | None
    theirs: Spread | None
    ratio: Spread | None
    goal: Goal | None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal or without anything to judge."""
        spread = self.ours if self.goal and self.goal.own else self.ratio
        return self.goal.met(spread.middle) if self.goal and spread else None


def compared(
    figure: str, ours: Sequence[Values], theirs: Sequence[Values], goals: Sequence[Goal] = ()
) -> Comparison:
    """One figure over paired rounds: ours[i] and theirs[i] followed one another."""
    pairs = [(a.get(figure), b.get(figure)) for a, b in zip(ours, theirs, strict=True)]
    return Comparison(
        figure,
        _over_rounds(figure, [a for a, _ in pairs]),
        _over_rounds(figure, [b for _, b in pairs]),
        Spread.of([a / b for a, b in pairs if a is not None and b]),
        next((goal for goal in goals if goal.figure == figure), None),
    )


def _over_rounds(figure: str, values: Sequence[float | None]) -> Spread | None:
    there = [value for value in values if value is not None]
    if there and FIGURES[figure].over_rounds == "worst":
        return Spread.of([max(there)])
    return Spread.of(there)
