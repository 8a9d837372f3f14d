"""Where a training stands, as one file: tensors and, in their header, everything else as JSON.

safetensors, so that opening it can run nothing; written whole or not at all, so that a kill at any moment
leaves the last whole one.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.atomic import whole
from quantize.errors import QuantizeError


class BrokenState(QuantizeError):
    """A state that cannot be gone on from."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}; delete it, and the training starts anew")


@dataclass(slots=True)
class Progressed:
    """What is told of a training, step by step. Losses are nats a token."""

    step: int = 0  # steps done
    seconds: float = 0.0  # of the steps, without measuring and saving
    n_tokens: int = 0  # computed, padding left out
    n_learnt: int = 0
    training: list[tuple[int, float]] = field(default_factory=list)  # (step, loss on its own batch)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    best_step: int = 0
    best_loss: float | None = None


@dataclass(slots=True)
class State:
    """`weights` are what learns now, `best` what it was at the best step, `moments` the optimizer's."""

    told: Progressed
    weights: dict[str, Tensor]
    best: dict[str, Tensor]
    moments: dict[str, Tensor]

    def save(self, path: Path) -> None:
        """Write it whole or not at all."""
        groups = {"weights": self.weights, "best": self.best, "moments": self.moments}
        tensors = {
            f"{group}/{name}": tensor.detach().cpu().contiguous()
            for group, named in groups.items()
            for name, tensor in named.items()
        }
        with whole(path) as partial:
            save_file(tensors, partial, metadata={"told": json.dumps(asdict(self.told))})

    @classmethod
    def load(cls, path: Path, shapes: Mapping[str, torch.Size]) -> "State":
        """Read it; raises BrokenState unless it is of what learns here, by name and shape."""
        try:
            with safe_open(path, framework="pt") as file:
                told = json.loads((file.metadata() or {})["told"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            groups: dict[str, dict[str, Tensor]] = {"weights": {}, "best": {}, "moments": {}}
            for name, tensor in tensors.items():
                group, _, rest = name.partition("/")
                groups[group][rest] = tensor
            state = cls(_told(told), **groups)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise BrokenState(path, f"cannot be read ({error})") from None
        if {name: tensor.shape for name, tensor in state.weights.items()} != dict(shapes):
            raise BrokenState(path, "is of another adapter")
        return state


def _told(values: dict) -> Progressed:
    told = Progressed(**values)
    told.training = [(step, loss) for step, loss in told.training]
    told.held_out = [(step, loss) for step, loss in told.held_out]
    return told
