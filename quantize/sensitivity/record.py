"""How much divergence each type costs each tensor, from gradients projected onto rounding errors.

For one window of text, a[s, l, k] = <G_l, W^_lk - W_l>, with G_l the gradient of tensor l under noise that
has the Fisher information of the predictions. To second order, rounding tensor l to type k adds a divergence
of mean_s a^2 / (2 tokens) a token, and a whole mix one of mean_s (sum_l a[s, l, k_l])^2 / (2 tokens).
Owns the record and its file; `backward` makes it, `shrink` smooths it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from models.atomic import whole
from quantize.errors import QuantizeError
from quantize.sensitivity.inputs import BLOCKS, input_block
from quantize.sensitivity.shrink import shrunk

_ARRAYS = ("projections", "traces", "kronecker", "squares", "inputs", "shares")


class UnknownChoice(QuantizeError):
    """A tensor or a type that was not measured."""

    def __init__(self, name: str, kind: str) -> None:
        super().__init__(f"no sensitivity of {name} in {kind} was measured; measure it with this type again")


class InvalidSensitivities(QuantizeError):
    """A file that holds no sensitivities."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} holds no sensitivities: {problem}; delete it and measure again")


@dataclass(frozen=True, slots=True)
class Sensitivities:
    """Everything measured; arrays over (tensors, types) hold NaN where a tensor was not offered a type.

    `projections`: (samples, tensors, types) float32; the samples of one window are next to each other,
    `n_draws` of them. `n_scored`: positions with a prediction in each sample. `traces`: trace(D H D^T) with
    D the rounding error and H the Hessian of the inputs: the mean square added to the outputs, summed over
    rows. `kronecker`: the same with every row weighed by its mean square gradient, in nats a token: what
    the divergence would be if inputs and gradients were independent. `squares`: the sum of D^2. Of a tied
    embedding `traces` are the head's alone; of an untied one all sums are over the rows that occurred.
    `inputs` (tensors, BLOCKS): nats a token that it costs to round what a tensor is multiplied with.
    `shares` (tensors,): of a tensor's rows those that were measured, and stand for all: 1 but for large ones.
    """

    key: str
    names: tuple[str, ...]
    types: tuple[str, ...]
    n_scored: int
    n_draws: int
    projections: np.ndarray
    traces: np.ndarray
    kronecker: np.ndarray
    squares: np.ndarray
    inputs: np.ndarray
    shares: np.ndarray

    @property
    def n_samples(self) -> int:
        """Samples measured: windows times draws."""
        return len(self.projections)

    def raw(self) -> np.ndarray:
        """(tensors, types): predicted divergence in nats a token; relative error about sqrt(2 / samples)."""
        return self._divergences().mean((0, 1))

    def _divergences(self) -> np.ndarray:
        """(windows, draws, tensors, types): what each sample alone predicts."""
        each = np.square(self.projections, dtype=np.float64) / (2 * self.n_scored)
        return each.reshape(-1, self.n_draws, *each.shape[1:])

    def shrunk(self) -> np.ndarray:
        """(tensors, types): `raw` pulled towards what the tensor's other types and like tensors say."""
        return shrunk(self.names, self._divergences().mean(1), self.kronecker)

    def of_inputs(self, name: str, kind: str) -> float:
        """Nats a token that a tensor's type costs by how CPU kernels round what it is multiplied with."""
        block = input_block(kind)
        return 0.0 if block is None else float(self.inputs[self.names.index(name), BLOCKS.index(block)])

    def predict(self, choice: Mapping[str, str], costs: np.ndarray | None = None) -> float:
        """Divergence of a mix, tensor -> type, its tensors' costs summed; `costs`: raw ones if None.

        Tensors that are not named stay as they are. Raises UnknownChoice.
        """
        costs = self.raw() if costs is None else costs
        return float(sum(costs[place] for place in self._places(choice)))

    def predict_jointly(self, choice: Mapping[str, str]) -> float:
        """The same with all cross terms between tensors; its relative error is about sqrt(2 / samples) where
        all rows were measured."""
        total = np.zeros(self.n_samples)
        for place in self._places(choice):
            total += self.projections[:, *place]
        return float(np.square(total).mean() / (2 * self.n_scored))

    def _places(self, choice: Mapping[str, str]) -> list[tuple[int, int]]:
        places = []
        for name, kind in choice.items():
            known = name in self.names and kind in self.types
            place = (self.names.index(name), self.types.index(kind)) if known else None
            if place is None or np.isnan(self.squares[place]):
                raise UnknownChoice(name, kind)
            places.append(place)
        return places

    def save(self, path: Path) -> None:
        """Write an .npz; it appears whole or not at all."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        with whole(path) as partial, partial.open("wb") as file:
            np.savez(
                file,
                key=np.array(self.key),
                names=np.array(self.names),
                types=np.array(self.types),
                counts=np.array([self.n_scored, self.n_draws]),
                **arrays,
            )

    @classmethod
    def load(cls, path: Path) -> "Sensitivities":
        """Read what `save` wrote; raises InvalidSensitivities."""
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                n_scored, n_draws = (int(count) for count in file["counts"])
                names, types = (tuple(str(text) for text in file[field]) for field in ("names", "types"))
                arrays = {name: file[name] for name in _ARRAYS}
                made = cls(str(file["key"]), names, types, n_scored, n_draws, **arrays)
        except (ValueError, KeyError, EOFError, OSError, BadZipFile) as error:
            raise InvalidSensitivities(path, str(error)) from None
        if made.projections.shape[1:] != (len(names), len(types)):
            raise InvalidSensitivities(path, f"projections have the shape {made.projections.shape}")
        return made
