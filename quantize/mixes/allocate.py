"""Choose one type a tensor, so that a mix within a byte budget diverges least. Pure: numbers in, a mix out.

Pareto fronts -> a Lagrangian's multiplier by bisection -> fill -> exchanges of up to three tensors. Knows no
files, no models and no clock; the search itself is `quantize.mixes.mixing`'s.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from quantize.errors import QuantizeError
from quantize.mixes import mixing
from quantize.mixes.interactions import Interactions, estimated_shrinkage, vectors
from quantize.mixes.mixing import Problem, Relaxed, polish, relax, relax_together

__all__ = ["Allocation", "Choice", "Interactions", "Mix", "Objective", "Tensor", "allocate", "speed_weight"]

Objective = Literal["size", "balanced", "speed"]
#: Of the divergence of the size objective's mix, what the others may give for speed.
ALLOWANCE: dict[Objective, float] = {"size": 1.0, "balanced": 1.1, "speed": 2.0}
#: Mixes that are offered for a measurement beside the best: each that differs has to be rounded for it.
RUNNERS_UP = 2
#: Runner-ups differ from all before them in tensors that hold so much of the bytes: less is not measurable.
APART = 0.04
#: Costs are estimates. Runner-ups are the best for costs drawn around them, this far (a factor's logarithm)
#: for a tensor as a whole and for each of its types.
DRAWS, SPREAD_TENSOR, SPREAD_TYPE = 7, 0.25, 0.08


class InvalidChoices(QuantizeError):
    """Numbers that no allocation can be made from."""


class BudgetTooSmall(QuantizeError):
    """A budget below what the tensors take at their smallest."""

    def __init__(self, budget_bytes: int, least_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.least_bytes = least_bytes
        super().__init__(
            f"the tensors may take {budget_bytes} bytes, and {least_bytes} is the least that they can take, "
            f"each in its smallest type: give {least_bytes - budget_bytes} bytes more, or allow smaller types"
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """One type for one tensor: bytes with the padding that the file puts after it, predicted nats a token.

    `cost` is the rounded weights', which other tensors' errors may add to or cancel; `inputs` is what the
    kernels add that round the product's inputs, chance that nothing cancels.
    """

    type: str
    size_bytes: int
    cost: float
    milliseconds: float = 0.0
    inputs: float = 0.0


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor and the types that it may have."""

    name: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Mix:
    """One type a tensor. `cost`: predicted nats a token, what tensors do to each other included."""

    types: dict[str, str]
    size_bytes: int
    cost: float
    milliseconds: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """The best mix found and the next best that differ enough to be worth measuring.

    `bound`: no mix in the budget has a lower cost + weight * milliseconds, by the Lagrangian's dual; None
    with interactions. `nats_per_byte`: what a byte more would take off. `shrinkage`: as used, None without
    interactions.
    """

    best: Mix
    runners_up: tuple[Mix, ...]
    bound: float | None
    nats_per_byte: float
    shrinkage: float | None


def allocate(
    tensors: Sequence[Tensor],
    budget_bytes: int,
    *,
    interactions: Interactions | None = None,
    weight: float = 0.0,
    runners_up: int = RUNNERS_UP,
) -> Allocation:
    """The mix of least predicted divergence + `weight` * milliseconds whose tensors fit in `budget_bytes`.

    `weight`: nats that a millisecond is worth (see `speed_weight`). Raises BudgetTooSmall, InvalidChoices.
    The same numbers give the same mix.
    """
    _check(tensors, budget_bytes, interactions, weight)
    table = _Table.of(tensors, weight, interactions)
    start = relax(table.problem, budget_bytes)
    shrinkage = None
    if interactions is not None:
        shrinkage = interactions.shrinkage
        if shrinkage is None:
            reference = table.problem.vectors[np.arange(len(tensors)), start.mix]
            shrinkage = estimated_shrinkage(reference)
        problem = replace(table.problem, vectors=table.problem.vectors * np.sqrt(shrinkage))
        table = replace(table, problem=problem)
    found = _candidates(table.problem, budget_bytes, start, together=bool(shrinkage))
    best, *others = _apart(table.problem, found, 1 + runners_up)
    return Allocation(
        table.mix(best),
        tuple(table.mix(other) for other in others),
        None if interactions is not None else start.bound,
        start.multiplier,
        shrinkage,
    )


def speed_weight(tensors: Sequence[Tensor], budget_bytes: int, objective: Objective) -> float:
    """Nats that a millisecond is worth for an objective: the most that keeps its allowance of divergence.

    So that a model of whatever size trades the same share of its faithfulness, at most, for speed.
    """
    _check(tensors, budget_bytes, None, 0.0)
    if objective not in ALLOWANCE:
        raise InvalidChoices(f"objective {objective!r} is none of {', '.join(ALLOWANCE)}")
    if objective == "size" or not any(choice.milliseconds for each in tensors for choice in each.choices):
        return 0.0

    def at(weight: float) -> Mix:
        table = _Table.of(tensors, weight, None)
        start = relax(table.problem, budget_bytes)
        return table.mix(mixing.fill(table.problem, budget_bytes, start.mix))

    plain = at(0.0)
    allowed = plain.cost * ALLOWANCE[objective]
    if not plain.milliseconds:
        return 0.0
    low, high = 0.0, max(allowed, 1e-9) / plain.milliseconds / 64
    while at(high).cost <= allowed and high * plain.milliseconds < 1e6 * max(allowed, 1e-9):
        low, high = high, 4 * high
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).cost <= allowed else (low, middle)
    return low


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """The problem, and which of a tensor's choices its columns are."""

    tensors: Sequence[Tensor]
    columns: np.ndarray
    problem: Problem
    costs: np.ndarray
    milliseconds: np.ndarray

    @classmethod
    def of(cls, tensors: Sequence[Tensor], weight: float, interactions: Interactions | None) -> "_Table":
        """Only what lies on a tensor's Pareto front is taken in."""
        fronts = []
        for tensor in tensors:
            sizes = np.array([choice.size_bytes for choice in tensor.choices])
            fronts.append(mixing.front(sizes, np.array([_worth(c, weight) for c in tensor.choices])))
        shape = len(tensors), max(map(len, fronts))
        columns = np.zeros(shape, int)
        sizes = np.full(shape, mixing.NO_BYTES)
        costs, inputs, milliseconds = np.full(shape, np.inf), np.zeros(shape), np.zeros(shape)
        for row, (tensor, kept) in enumerate(zip(tensors, fronts, strict=True)):
            columns[row, : len(kept)] = kept
            for column, index in enumerate(kept):
                choice = tensor.choices[index]
                sizes[row, column], costs[row, column] = choice.size_bytes, choice.cost
                inputs[row, column], milliseconds[row, column] = choice.inputs, choice.milliseconds
        crossed = np.zeros((*shape, 0))
        if interactions is not None:
            picked = interactions.projections[:, np.arange(shape[0])[:, None], columns]
            crossed = vectors(replace(interactions, projections=picked), costs)
        costs = costs + inputs
        problem = Problem(sizes, costs + weight * milliseconds, crossed)
        return cls(tensors, columns, problem, costs, milliseconds)

    def mix(self, chosen: np.ndarray) -> Mix:
        """In the words of the caller."""
        rows = np.arange(len(chosen))
        milliseconds = float(self.milliseconds[rows, chosen].sum())
        costs = replace(self.problem, values=self.costs)
        pairs = zip(self.tensors, self.columns[rows, chosen], strict=True)
        types = {tensor.name: tensor.choices[index].type for tensor, index in pairs}
        return Mix(types, self.problem.bytes(chosen), costs.value(chosen), milliseconds)


def _worth(choice: Choice, weight: float) -> float:
    return choice.cost + choice.inputs + weight * choice.milliseconds


def _candidates(problem: Problem, budget: int, start: Relaxed, *, together: bool) -> list[np.ndarray]:
    """Mixes that fit, the plain search's first; each is as good as exchanges make it, for its costs."""
    starts = [polish(problem.alone() if together else problem, budget, start.mix, start.multiplier)]
    if together:
        settled = relax_together(problem, budget, start)
        starts += [polish(problem, budget, mix, start.multiplier) for mix in (settled, starts[0])]
    draw = np.random.default_rng(0)
    found = list(starts)
    for _ in range(DRAWS):
        factor = draw.normal(0, SPREAD_TENSOR, (len(problem.sizes), 1))
        factor = np.exp(factor + draw.normal(0, SPREAD_TYPE, problem.sizes.shape))
        drawn = replace(problem.alone(), values=problem.values * factor)
        other = mixing.fill(drawn, budget, relax(drawn, budget).mix)
        found += [other, polish(problem, budget, other, start.multiplier)]
    return found


def _apart(problem: Problem, found: list[np.ndarray], count: int) -> list[np.ndarray]:
    """The best, and the best of those that differ enough from all before them."""
    kept: list[np.ndarray] = []
    rows = np.arange(len(problem.sizes))
    for mix in sorted(found, key=problem.value):
        sizes = problem.sizes[rows, mix]
        if all(sizes[mix != other].sum() >= APART * sizes.sum() and (mix != other).any() for other in kept):
            kept.append(mix)
        if len(kept) == count:
            break
    return kept


def _check(tensors: Sequence[Tensor], budget: int, interactions: Interactions | None, weight: float) -> None:
    if not tensors:
        raise InvalidChoices("there is no tensor to choose a type for")
    names = [tensor.name for tensor in tensors]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidChoices(f"tensor {twice} is named twice")
    if not (np.isfinite(weight) and weight >= 0):
        raise InvalidChoices(f"a millisecond's weight is {weight}; give nats, 0 or more")
    for tensor in tensors:
        _check_tensor(tensor)
    least = sum(min(choice.size_bytes for choice in tensor.choices) for tensor in tensors)
    if budget < least:
        raise BudgetTooSmall(budget, least)
    if interactions is not None:
        _check_interactions(tensors, interactions)


def _check_tensor(tensor: Tensor) -> None:
    types = [choice.type for choice in tensor.choices]
    if not types:
        raise InvalidChoices(f"tensor {tensor.name} has no type that it may have")
    if len(set(types)) < len(types):
        raise InvalidChoices(f"tensor {tensor.name} has a type twice: {', '.join(types)}")
    for choice in tensor.choices:
        if choice.size_bytes <= 0:
            raise InvalidChoices(f"tensor {tensor.name} as {choice.type} has {choice.size_bytes} bytes")
        for what in ("cost", "milliseconds", "inputs"):
            value = getattr(choice, what)
            if not (np.isfinite(value) and value >= 0):
                raise InvalidChoices(
                    f"tensor {tensor.name} as {choice.type}: {what} is {value}; give a number, 0 or more"
                )


def _check_interactions(tensors: Sequence[Tensor], given: Interactions) -> None:
    shape, widest = given.projections.shape, max(len(tensor.choices) for tensor in tensors)
    if len(shape) != 3 or not shape[0] or shape[1] != len(tensors) or shape[2] < widest:
        raise InvalidChoices(
            f"projections are {list(shape)}; give (samples, {len(tensors)} tensors, {widest} choices)"
        )
    for row, tensor in enumerate(tensors):
        if not np.isfinite(given.projections[:, row, : len(tensor.choices)]).all():
            raise InvalidChoices(f"projections of tensor {tensor.name} hold numbers that are not finite")
    if not given.n_tokens > 0:
        raise InvalidChoices(f"n_tokens is {given.n_tokens}; give the tokens of a sample")
    if given.shrinkage is not None and not 0 <= given.shrinkage <= 1:
        raise InvalidChoices(f"shrinkage is {given.shrinkage}; give a number from 0 to 1, or None")
