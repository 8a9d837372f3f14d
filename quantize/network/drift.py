"""How far the inputs of a rounded network's products are from the source's, and which weights make up for it.

Every product of a rounded network gets other inputs than the source's, since what comes before it was rounded
too. With x the source's inputs, x~ the rounded network's, and r what its residual stream lacks where the
product's output is added to it, the weights that give most of what the source gives are those least squares
away from W: W + (W E[(x - x~) x~^T] + E[r x~^T]) (E[x~ x~^T] + ridge)^-1 (GPTAQ, Li et al. 2025, has the
first of the two terms). Where an output is added to the stream, tokens count by the inverse square of its
size: the few that the model makes huge, for others to attend to, would outweigh all others. Owns the sums and
that solution; knows no files and no rounding.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantize.network.hessian import input_of
from quantize.network.network import Layer
from quantize.network.stream import blocks

#: Of the diagonal of E[x~ x~^T], added to it, times how many columns there are for a token: what few tokens
#: say of a correction is half chance.
RIDGE = 24.0


class _Reached(Exception):
    """The product that was waited for."""


def products(layer: Layer, hidden: Tensor) -> list[list[str]]:
    """Names of a layer's products in the order in which they are computed, those of one input together."""
    names: list[str] = []
    layer(hidden[:1, :1], lambda name, *_: names.append(name))
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(input_of(name), []).append(name)
    return list(groups.values())


@dataclass(slots=True)
class Seen:
    """What a layer computes, by products: `inputs` (batch, tokens, n), and `streams` (batch, tokens, n_embd),
    the hidden states with a product's output added, of those that are."""

    inputs: dict[str, Tensor]
    streams: dict[str, Tensor]


def watch(layer: Layer, hidden: Tensor, names: Sequence[str]) -> Seen:
    """Compute a layer of (batch, tokens, n_embd) up to the last of these products."""
    seen, stream = Seen({}, {}), hidden

    def tap(name: str, inputs: Tensor, outputs: Tensor) -> None:
        nonlocal stream
        if name in names:
            seen.inputs[name] = inputs
        if layer.adds(name):
            seen.streams[name] = stream = stream + outputs
        if name == names[-1]:
            raise _Reached

    with suppress(_Reached):
        layer(hidden, tap)
    return seen


@dataclass(slots=True)
class Drift:
    """Means over tokens: `moments` (n, n) E[x~ x~^T], `cross` (n, n) E[(x - x~) x~^T], and `missing` (out, n)
    E[r x~^T], None for products whose output is not added to the residual stream. Float32."""

    moments: Tensor
    cross: Tensor
    missing: Tensor | None
    n_tokens: int

    @classmethod
    def over(cls, parts: Iterable[tuple[Tensor, Tensor, Tensor | None]]) -> "Drift":
        """Of (tokens, n) inputs in the source, those in the rounded network, and (tokens, out) of what is
        missing; each time some tokens, all on their own."""
        sums: list[Tensor] = []
        n_tokens = 0
        for source, made, missing in parts:
            lefts = [made, source - made, *([] if missing is None else [missing])]
            sums = sums or [left.new_zeros(left.shape[1], made.shape[1]) for left in lefts]
            for total, left in zip(sums, lefts, strict=True):
                total.addmm_(left.T, made)
            n_tokens += len(made)
        moments, cross, *missing_too = (total / n_tokens for total in sums)
        return cls(moments, cross, missing_too[0] if missing_too else None, n_tokens)

    def correction(self) -> tuple[Tensor, Tensor | None]:
        """C and M of the weights W + W C + M, (n, n) and (out, n) or None; float32."""
        n, diagonal = len(self.moments), self.moments.diagonal()
        # in units of each column's size, where the ridge is a number and float32 is enough
        root = diagonal.sqrt().where(diagonal > 0, diagonal.new_ones(()))
        scaled = self.moments / root / root[:, None]
        scaled.diagonal().copy_(diagonal.new_full((n,), 1 + RIDGE * n / self.n_tokens))
        lower = torch.linalg.cholesky(scaled)

        def solved(left: Tensor) -> Tensor:
            return torch.cholesky_solve((left / root).T, lower).T / root

        return solved(self.cross), None if self.missing is None else solved(self.missing)


@dataclass(slots=True)
class Pair:
    """One layer of the source and of the network that is being rounded, and what goes into each: (windows,
    tokens, n_embd). `watched`: what the source's gives, computed once."""

    source: Layer
    made: Layer
    hidden: Tensor
    made_hidden: Tensor
    groups: list[list[str]]
    watched: dict[int, Seen] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Layer, made: Layer, hidden: Tensor, made_hidden: Tensor) -> "Pair":
        """`made` has the source's weights until it is given others."""
        return cls(source, made, hidden, made_hidden, products(source, hidden))

    def drift(self, group: Sequence[str]) -> Drift:
        """Of the product, or products, that read one input; those before it must be as they will stay."""
        return Drift.over(self._parts(group[0]))

    def _parts(self, first: str) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        firsts = [group[0] for group in self.groups]
        for part in blocks(*self.hidden.shape[:2]):
            if part.start not in self.watched:
                self.watched[part.start] = watch(self.source, self.hidden[part], firsts)
            truth = self.watched[part.start]
            found = watch(self.made, self.made_hidden[part], [first])
            rows = [truth.inputs[first], found.inputs[first]]
            if first in truth.streams:
                before = [*truth.streams].index(first)
                ours, theirs = (
                    [hidden[part], *seen.streams.values()][before]
                    for hidden, seen in ((self.made_hidden, found), (self.hidden, truth))
                )
                # what follows divides by the size of the hidden states: an error counts by its share of them
                share = truth.streams[first].square().mean(-1, keepdim=True).rsqrt()
                rows = [share * each for each in (*rows, theirs - ours)]
            source, made, *missing = (each.flatten(0, 1) for each in rows)
            yield source, made, missing[0] if missing else None
