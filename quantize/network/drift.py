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
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.network.network import Layer, Stage
from quantize.network.stream import blocks

#: Of the diagonal of E[x~ x~^T], added to it, times how many columns there are for a token: what few tokens
#: say of a correction is half chance.
RIDGE = 24.0
#: Of a token's hidden state at least, in its mean square: one of zeros, an untrained token's, has no share.
LEAST_SQUARE = 1e-20


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


@dataclass(frozen=True, slots=True)
class Group:
    """The products of a layer that read one input. For some windows at a time, `truth` and `found` are where
    the source's layer and the other one are, and `streams` (batch, tokens, n_embd) the source's hidden states
    with the product's output added; None where it is not added as it is."""

    names: tuple[str, ...]
    truth: Sequence[Stage]
    found: Sequence[Stage]
    streams: Sequence[Tensor] | None

    def drift(self) -> Drift:
        """Over all of the windows."""
        return Drift.over(self._parts())

    def _parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        for index, (truth, found) in enumerate(zip(self.truth, self.found, strict=True)):
            rows = [truth.inputs, found.inputs]
            if self.streams is not None:
                # what follows divides by the size of the hidden states: an error counts by its share of them
                share = self.streams[index].square().mean(-1, keepdim=True).clamp_min(LEAST_SQUARE).rsqrt()
                rows = [share * each for each in (*rows, truth.hidden - found.hidden)]
            source, made, *missing = (each.flatten(0, 1) for each in rows)
            yield source, made, missing[0] if missing else None


def side_by_side(source: Layer, made: Layer, hidden: Tensor, made_hidden: Tensor) -> Iterator[Group]:
    """Compute a layer of the source and of the network that is being rounded, stopping before each group,
    whose weights in `made` may be replaced then.

    `hidden` and `made_hidden` (windows, tokens, n_embd) are what goes in, and in the end what comes out.
    """
    parts = [*blocks(*hidden.shape[:2])]
    theirs = [source.stages(hidden[part]) for part in parts]
    ours = [made.stages(made_hidden[part]) for part in parts]
    truth, found = [next(stages) for stages in theirs], [next(stages) for stages in ours]
    while names := truth[0].names:
        after = [next(stages) for stages in theirs]
        streams = [stage.hidden for stage in after] if source.adds(names[0]) else None
        yield Group(names, truth, found, streams)
        truth, found = after, [next(stages) for stages in ours]
    for part, end, made_end in zip(parts, truth, found, strict=True):
        hidden[part], made_hidden[part] = end.hidden, made_end.hidden
