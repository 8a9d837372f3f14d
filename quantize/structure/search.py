"""Which layers to leave out: one after the other, always the one whose loss is measured to cost least.

Pure: how layers are ranked and what leaving them out costs are callables. What a byte is worth elsewhere, as
a price in nats a byte, comes from files of smaller types (`price`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from quantize.divergence import Estimate
from quantize.errors import QuantizeError

#: Layers of the least influence that are tried each time.
CANDIDATES = 8

Asked = int | Literal["auto"]
Rank = Callable[[Sequence[int]], Sequence[float]]  # layers that are left -> influence of each
Cost = Callable[[frozenset[int]], Estimate]  # layers that are left out -> mean KLD to the whole model


@dataclass(frozen=True, slots=True)
class Trial:
    """Leaving out one more layer: its influence, and the mean KLD of the model that is left."""

    layer: int
    influence: float
    kl: Estimate


@dataclass(frozen=True, slots=True)
class Round:
    """All that was tried with the layers before left out; `taken`: the layer that then went, None if none."""

    before: tuple[int, ...]
    trials: tuple[Trial, ...]
    taken: int | None

    @property
    def best(self) -> Trial:
        """Of the least divergence."""
        return min(self.trials, key=lambda trial: trial.kl.mean)


@dataclass(frozen=True, slots=True)
class Rung:
    """A file of all layers in one type: its bytes and its mean KLD to the reference."""

    type: str
    size_bytes: int
    kl: float


@dataclass(frozen=True, slots=True)
class Price:
    """What smaller types ask for a byte about a file of `target_bytes`: from the one rung to the other."""

    nats_per_byte: float
    target_bytes: int
    larger: Rung
    smaller: Rung


def search(
    n_layer: int,
    most: int,
    rank: Rank,
    cost: Cost,
    *,
    pays: Callable[[float], bool] = lambda _: True,
    candidates: int = CANDIDATES,
) -> list[Round]:
    """Rounds until `most` layers are gone, or until the best one does not pay.

    `pays` is asked about the divergence that leaving out one more layer adds.
    """
    rounds: list[Round] = []
    dropped: list[int] = []
    reached = 0.0
    while len(dropped) < most:
        left = [layer for layer in range(n_layer) if layer not in dropped]
        influences = dict(zip(left, rank(left), strict=True))
        tried = sorted(left, key=lambda layer: influences[layer])[:candidates]
        trials = tuple(Trial(layer, influences[layer], cost(frozenset((*dropped, layer)))) for layer in tried)
        found = Round(tuple(dropped), trials, None)
        best = found.best
        if not pays(best.kl.mean - reached):
            return [*rounds, found]
        rounds.append(Round(tuple(dropped), trials, best.layer))
        dropped.append(best.layer)
        reached = best.kl.mean
    return rounds


def price(rungs: Sequence[Rung], target_bytes: int) -> Price | None:
    """The slope of the lower hull of the rungs at `target_bytes`, of its last piece beyond its ends.

    None where the rungs make no piece that falls: then smaller types are not worse, or there is but one.
    """
    hull = _hull(rungs)
    if len(hull) < 2:
        return None
    pairs = list(zip(hull[1:], hull[:-1], strict=True))  # (larger, smaller), sizes ascending
    larger, smaller = next((pair for pair in pairs if target_bytes <= pair[0].size_bytes), pairs[-1])
    slope = (smaller.kl - larger.kl) / (larger.size_bytes - smaller.size_bytes)
    return Price(slope, target_bytes, larger, smaller)


def _hull(rungs: Sequence[Rung]) -> list[Rung]:
    """The rungs that no mix of others beats, by ascending bytes and falling divergence."""
    best: dict[int, Rung] = {}
    for rung in rungs:
        if rung.size_bytes not in best or rung.kl < best[rung.size_bytes].kl:
            best[rung.size_bytes] = rung
    hull: list[Rung] = []
    for rung in (best[size] for size in sorted(best)):
        if hull and rung.kl >= hull[-1].kl:
            continue
        while _above(hull, rung):
            hull.pop()
        hull.append(rung)
    return hull


def _above(hull: Sequence[Rung], rung: Rung) -> bool:
    """Whether the last of the hull lies on or above the line from the one before it to the next rung."""
    if len(hull) < 2:
        return False
    first, last = hull[-2:]
    line = first.kl + (rung.kl - first.kl) * (last.size_bytes - first.size_bytes) / (
        rung.size_bytes - first.size_bytes
    )
    return last.kl >= line


def parse_layers(text: str) -> Asked:
    """A number of at least 1, or "auto"; raises InvalidLayers."""
    if text == "auto":
        return "auto"
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise InvalidLayers(text)
    return int(text)


class InvalidLayers(QuantizeError):
    """A number of layers that is none."""

    def __init__(self, text: str) -> None:
        super().__init__(f"--prune-layers is {text!r}; give a number of layers, 1 or more, or auto")
