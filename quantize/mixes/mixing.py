"""Search for the best choice of one type a tensor: Lagrangian, fill, exchanges. Arrays in, arrays out.

Owns the search; what the numbers mean, names and errors are `quantize.mixes.allocate`'s. numpy only.
"""

from dataclasses import dataclass, replace

import numpy as np

#: Stands for the bytes of a choice that a tensor does not have; sums of it do not overflow.
NO_BYTES = 1 << 50
BISECTIONS = 60
#: Moves that exchanges of two and of three are made of, the most promising first.
PAIR_MOVES, TRIPLE_MOVES = 256, 48
#: Ends a search that improves by ever less; about thirty exchanges are usual.
MAX_EXCHANGES = 400
MAX_SWEEPS = 20


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Rows are tensors, columns their choices from the smallest on; both have the same number of columns.

    `sizes` (tensors, choices) int64; `values` the same, float64, what is to be minimised, inf where a tensor
    has no such choice; `vectors` (tensors, choices, samples): sum_{l != m} v_l . v_m is added to the values.
    """

    sizes: np.ndarray
    values: np.ndarray
    vectors: np.ndarray

    def bytes(self, mix: np.ndarray) -> int:
        """All tensors together."""
        return int(self.sizes[np.arange(len(mix)), mix].sum())

    def value(self, mix: np.ndarray) -> float:
        """What a mix is worth; less is better."""
        rows = np.arange(len(mix))
        taken = self.vectors[rows, mix]
        together = float((taken.sum(0) ** 2).sum() - (taken**2).sum())
        return float(self.values[rows, mix].sum()) + together

    def alone(self) -> "Problem":
        """The same without what tensors do to each other."""
        return replace(self, vectors=self.vectors[:, :, :0])


@dataclass(frozen=True, slots=True)
class Relaxed:
    """A mix that fits, nats a byte where it lies on the fronts, and what no mix that fits falls below."""

    mix: np.ndarray
    multiplier: float
    bound: float


def front(sizes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Indices of the choices of one tensor that no other beats, from the smallest on."""
    order = np.lexsort((values, sizes))
    lowest = np.minimum.accumulate(np.concatenate([[np.inf], values[order][:-1]]))
    return order[values[order] < lowest]


def relax(problem: Problem, budget: int) -> Relaxed:
    """Minimise value + multiplier * bytes tensor by tensor, with the least multiplier whose mix fits.

    Tensors are taken one by one, so what they do to each other is left out. The bound is the Lagrangian's.
    """

    def at(multiplier: float) -> tuple[np.ndarray, float]:
        priced = problem.values + multiplier * problem.sizes
        return priced.argmin(1), float(priced.min(1).sum()) - multiplier * budget

    low, high = 0.0, 1e-18
    mix, bound = at(low)
    if problem.bytes(mix) <= budget:
        return Relaxed(mix, 0.0, bound)
    while problem.bytes((found := at(high))[0]) > budget:
        bound = max(bound, found[1])
        low, high = high, high * 4
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        mix, lower = at(middle)
        bound = max(bound, lower)
        low, high = (low, middle) if problem.bytes(mix) <= budget else (middle, high)
    mix, lower = at(high)
    return Relaxed(mix, high, max(bound, lower))


def relax_together(problem: Problem, budget: int, start: Relaxed) -> np.ndarray:
    """From a relaxed mix to one where each tensor's choice is best beside the others' at one price a byte."""
    best = start.mix
    middle = start.multiplier or 1e-15
    low, high = middle / 16, middle * 16
    for _ in range(10):
        found = _settle(problem, best, middle)
        if problem.bytes(found) <= budget:
            best, high = found, middle
        else:
            low = middle
        middle = float(np.sqrt(low * high))
    return best


def _settle(problem: Problem, mix: np.ndarray, multiplier: float) -> np.ndarray:
    """Each tensor in turn takes what is best beside the others, until none moves."""
    mix = mix.copy()
    total = problem.vectors[np.arange(len(mix)), mix].sum(0)
    priced = problem.values + multiplier * problem.sizes
    for _ in range(MAX_SWEEPS):
        moved = False
        for tensor, old in enumerate(mix.tolist()):
            own = problem.vectors[tensor]
            rest = total - own[old]
            worth = priced[tensor] + 2 * (own @ rest)
            new = int(worth.argmin())
            if worth[new] < worth[old]:
                mix[tensor], total, moved = new, rest + own[new], True
        if not moved:
            break
    return mix


def polish(problem: Problem, budget: int, mix: np.ndarray, multiplier: float) -> np.ndarray:
    """Fill what is left of the budget, then exchange up to three tensors at a time while that helps."""
    mix = fill(problem, budget, mix)
    scale = float(np.abs(problem.values[np.arange(len(mix)), mix]).sum())
    for _ in range(MAX_EXCHANGES):
        moves = _Moves.of(problem, mix, multiplier)
        change, chosen = moves.best(budget - problem.bytes(mix))
        if change >= -1e-12 * scale:
            break
        mix = mix.copy()
        mix[moves.tensor[chosen]] = moves.choice[chosen]
    return mix


def fill(problem: Problem, budget: int, mix: np.ndarray) -> np.ndarray:
    """Take single moves that fit, most gained a byte first."""
    mix = mix.copy()
    for _ in range(4 * problem.sizes.size):
        change, more = _changes(problem, mix)
        fits = (more <= budget - problem.bytes(mix)) & (change < 0)
        if not fits.any():
            break
        gain = np.where(fits, -change / np.maximum(more, 1), -np.inf)
        tensor, choice = np.unravel_index(gain.argmax(), gain.shape)
        if change[tensor, choice] > -1e-15 * np.abs(problem.values[tensor, mix[tensor]]):
            break  # rounding of the arithmetic
        mix[tensor] = choice
    return mix


def _changes(problem: Problem, mix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(tensors, choices) what each single move adds to the value, and to the bytes."""
    rows = np.arange(len(mix))
    taken = problem.vectors[rows, mix]
    rest = taken.sum(0) - taken
    crossed = 2 * np.matmul(problem.vectors, rest[:, :, None])[:, :, 0]
    worth = problem.values + crossed
    return worth - worth[rows, mix][:, None], problem.sizes - problem.sizes[rows, mix][:, None]


@dataclass(frozen=True, slots=True, eq=False)
class _Moves:
    """The most promising single moves; `steps` (moves, samples): what each adds to the sum of vectors."""

    tensor: np.ndarray
    choice: np.ndarray
    change: np.ndarray
    more: np.ndarray
    steps: np.ndarray

    @classmethod
    def of(cls, problem: Problem, mix: np.ndarray, multiplier: float) -> "_Moves":
        """Those of least change + multiplier * bytes.

        An exchange helps only if these sum to less than the multiplier times what is left of the budget, and
        at the Lagrangian's optimum none is below zero: what is not among the first has no part in it.
        """
        change, more = _changes(problem, mix)
        promise = change + multiplier * more
        promise[np.arange(len(mix)), mix] = np.inf
        promise = np.where(np.isfinite(problem.values), promise, np.inf).ravel()
        first = np.argsort(promise, kind="stable")[:PAIR_MOVES]
        tensor, choice = np.unravel_index(first[np.isfinite(promise[first])], change.shape)
        steps = problem.vectors[tensor, choice] - problem.vectors[tensor, mix[tensor]]
        return cls(tensor, choice, change[tensor, choice], more[tensor, choice], steps)

    def best(self, left: int) -> tuple[float, list[int]]:
        """The change of the best exchange of one to three moves that fits, and which moves."""
        if not len(self.tensor):
            return 0.0, []
        apart = self.tensor[:, None] != self.tensor[None]
        crossed = np.where(apart, 2 * self.steps @ self.steps.T, np.inf)
        pairs = self.change[:, None] + self.change[None] + crossed
        found = [
            _least(self.change, self.more, left),
            _least(pairs, self.more[:, None] + self.more[None], left),
        ]
        few = slice(TRIPLE_MOVES)
        change, more, crossed, pairs = self.change[few], self.more[few], crossed[few, few], pairs[few, few]
        triples = pairs[:, :, None] + change + crossed[:, None, :] + crossed[None, :, :]
        found.append(_least(triples, (more[:, None] + more)[:, :, None] + more, left))
        return min(found)


def _least(change: np.ndarray, more: np.ndarray, left: int) -> tuple[float, list[int]]:
    """The least change among those that fit, and where it is."""
    fitting = np.where(more <= left, change, np.inf)
    place = np.unravel_index(fitting.argmin(), fitting.shape)
    return float(fitting[place]), [int(index) for index in place]
