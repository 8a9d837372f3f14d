"""The changes that leave a model's function as it is: scales, rotations, orders of channels, zero padding.

Each says for which models it is exact, and finds its numbers from the weights and the moments of what they
read. Whether one helps is measured elsewhere.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from models.gguf import Header
from quantize.errors import QuantizeError
from quantize.network.network import EMBEDDING, OUTPUT, OUTPUT_NORM
from quantize.transforms.biases import may_have_bias
from quantize.transforms.folded import Fold, Folded
from quantize.transforms.maps import Chain, Map, Permutation, Rotation, Scale, random_rotation
from quantize.transforms.padding import Pad
from quantize.transforms.places import Kind, Place, along, gates, places, stream, unsupported
from quantize.transforms.scaling import Round, loss, sampled, search

#: A norm weight this far below the largest cannot be divided out of what it scales.
LEAST_NORM = 1e-5
ORDER_ROWS = 64  # of each matrix, to compare orders of the residual stream


class CannotFold(QuantizeError):
    """A model whose numbers do not allow a change that its shape does, or have nothing to gain by it."""


class Transform(Protocol):
    """One kind of change."""

    @property
    def name(self) -> str:
        """As reports call it."""
        ...

    def applies(self, header: Header) -> str | None:
        """Why it would not be exact for a model, or would do nothing; None where it can be used."""
        ...

    def fold(self, model: Folded) -> Fold:
        """The change of this model; raises CannotFold."""
        ...


def transforms(rounded: Round, *, seed: int = 0) -> tuple[Transform, ...]:
    """All of them. `rounded`: how weights will be rounded, which scales and orders are compared by."""
    return (
        Scales("scale-norms", "norm", rounded),
        Scales("scale-values", "value", rounded),
        Scales("scale-inner", "inner", rounded),
        RotateValues(seed),
        OrderInner(rounded),
        OrderStream(rounded),
        RotateStream(seed),
        Biases(),
        Pad(),
    )


@dataclass(frozen=True, slots=True)
class Scales:
    """Input channels of matrices scaled by powers of their mean squares, as `scaling.search` finds them."""

    name: str
    kind: Kind
    rounded: Round

    def applies(self, header: Header) -> str | None:
        """Exact for every decoder known: no bias follows a norm, and other biases are scaled along."""
        return unsupported(header)

    def fold(self, model: Folded) -> Fold:
        """One pair of exponents a place."""
        columns: dict[str, Map] = {}
        rows: dict[str, Map] = {}
        for place in places(model):
            if place.kind != self.kind:
                continue
            readers = [sampled(model.array(name)) for name in place.readers]
            found = search(readers, model.read(place.readers[0]), self.rounded, shared=place.shared)
            if found.ratio == 1:
                continue
            columns |= dict.fromkeys(place.readers, Scale(found.factors))
            rows |= place.rows(model, Scale(_made(place, found.factors)))
        if not columns:
            raise CannotFold("no scales tried lower the loss of any product")
        return Fold(self.name, columns, rows)


def _made(place: Place, factors: np.ndarray) -> np.ndarray:
    """A reader's factors, one a channel made."""
    if place.shared is None:
        return factors
    return factors[np.unique(place.shared, return_index=True)[1]]


@dataclass(frozen=True, slots=True)
class RotateValues:
    """R2 of SpinQuant: a random rotation of each key-value head between its values and the output."""

    seed: int
    name: str = "rotate-values"

    def applies(self, header: Header) -> str | None:
        """Exact for every decoder known: attention only averages values."""
        return unsupported(header)

    def fold(self, model: Folded) -> Fold:
        """Another rotation each layer and head."""
        random = np.random.default_rng(self.seed)
        columns: dict[str, Map] = {}
        rows: dict[str, Map] = {}
        for place in places(model):
            if place.kind == "value":
                change = random_rotation(place.head_width, place.width // place.head_width, random)
                rows |= place.rows(model, change)
                read = Rotation(np.repeat(change.blocks, place.repeats, 0))
                columns |= dict.fromkeys(place.readers, read)
        return Fold(self.name, columns, rows)


@dataclass(frozen=True, slots=True)
class OrderInner:
    """Channels between up and down in another order, so that like ones share a block; free and exact."""

    rounded: Round
    name: str = "order-inner"

    def applies(self, header: Header) -> str | None:
        """Exact for every decoder known."""
        return unsupported(header)

    def fold(self, model: Folded) -> Fold:
        """A layer keeps its order where no other has a lower loss."""
        columns: dict[str, Map] = {}
        rows: dict[str, Map] = {}
        for place in places(model):
            if place.kind != "inner":
                continue
            weights, hessian = sampled(model.array(place.readers[0])), model.read(place.readers[0])
            driven, weighed = np.diagonal(hessian), np.square(weights).mean(0)
            orders = [np.argsort(-key, kind="stable") for key in (driven, weighed, driven * weighed)]
            losses = [_ordered(weights, hessian, order, self.rounded) for order in orders]
            best = int(np.argmin(losses))
            if losses[best] >= loss(weights, hessian, self.rounded):
                continue
            change = Permutation(orders[best])
            columns |= dict.fromkeys(place.readers, change)
            rows |= place.rows(model, change) | gates(model, place, change)
        if not columns:
            raise CannotFold("no order tried lowers the loss of any layer")
        return Fold(self.name, columns, rows)


def _ordered(weights: np.ndarray, hessian: np.ndarray, order: np.ndarray, rounded: Round) -> float:
    return loss(np.ascontiguousarray(weights[:, order]), hessian[np.ix_(order, order)], rounded)


@dataclass(frozen=True, slots=True)
class OrderStream:
    """Channels of the residual stream in another order, in all layers, the embedding and the head."""

    rounded: Round
    name: str = "order-stream"

    def applies(self, header: Header) -> str | None:
        """Exact for every decoder known, tied ones too."""
        return unsupported(header)

    def fold(self, model: Folded) -> Fold:
        """By how much channels are driven or weighed on average, whichever has the lower loss."""
        line = stream(model)
        readers = [name for name in line.readers if name != OUTPUT]
        driven, weighed = np.zeros((2, model.shape(OUTPUT_NORM)[0]))
        for name in readers:
            squares = np.diagonal(model.read(name)).astype(np.float64)
            driven += squares / max(squares.mean(), 1e-30)
            columns = np.square(sampled(model.array(name)), dtype=np.float64).mean(0)
            weighed += columns / max(columns.mean(), 1e-30)
        orders = [np.argsort(-key, kind="stable") for key in (driven, weighed, driven * weighed)]
        losses = np.zeros(len(orders))
        for name in readers:
            weights, hessian = sampled(model.array(name), ORDER_ROWS), model.read(name)
            base = loss(weights, hessian, self.rounded)
            found = [_ordered(weights, hessian, order, self.rounded) for order in orders]
            losses += np.array(found) / base if base else 1.0
        best = int(np.argmin(losses))
        if losses[best] >= len(readers):
            raise CannotFold(
                f"no order tried lowers the loss: the best makes it {losses[best] / len(readers):.3f}"
            )
        return Fold(self.name, *along(line, Permutation(orders[best])))


@dataclass(frozen=True, slots=True)
class RotateStream:
    """R1 of QuaRot: a random rotation of the residual stream, norms' weights going into their readers."""

    seed: int
    name: str = "rotate-stream"

    def applies(self, header: Header) -> str | None:
        """Where embedding and head are one tensor, the last norm cannot go into the head alone."""
        if (reason := unsupported(header)) is not None:
            return reason
        tensors = {tensor.name: tensor for tensor in header.tensors}
        if OUTPUT not in tensors:
            share = tensors[EMBEDDING].n_elements / header.n_parameters
            return (
                "the head is the embedding, and a rotation needs the last norm's weight in the head alone: a "
                f"second table would add {100 * share:.0f} % of the weights"
            )
        if any("post_" in name and name.endswith("norm.weight") for name in tensors):
            return "norms' weights stand before the residual sum, where no matrix follows to take them"
        return None

    def fold(self, model: Folded) -> Fold:
        """Norms' weights become 1."""
        line, width = stream(model), model.shape(OUTPUT_NORM)[0]
        change = random_rotation(width, 1, np.random.default_rng(self.seed))
        columns, rows = along(line, change)
        for name in line.norms:
            weights = model.array(name)
            least, largest = np.abs(weights).min(), np.abs(weights).max()
            if least < LEAST_NORM * largest:
                raise CannotFold(f"{name} holds a weight of {least:.3g}: too small to divide by")
            rows[name] = Scale(weights)
            readers = [reader for reader, norm in line.readers.items() if norm == name]
            columns |= dict.fromkeys(readers, Chain((Scale(weights), change)))
        return Fold(self.name, columns, rows)


@dataclass(frozen=True, slots=True)
class Biases:
    """Biases, new ones of zeros, that are corrected for the mean error of weights once these are rounded."""

    name: str = "biases"

    def applies(self, header: Header) -> str | None:
        """Some architectures add biases where a file has them; of others only old ones are corrected."""
        if (reason := unsupported(header)) is not None:
            return reason
        if not any(may_have_bias(header, tensor.name) for tensor in header.tensors):
            return f"llama.cpp's {header.architecture} has no biases where this model has none"
        return None

    def fold(self, model: Folded) -> Fold:
        """Nothing but zeros as yet."""
        names = [name for name in model.tensors if may_have_bias(model.header, name)]
        rows = {name.removesuffix("weight") + "bias": model.shape(name)[0] for name in names}
        return Fold(self.name, added={b: n for b, n in rows.items() if b not in model}, corrects=True)
