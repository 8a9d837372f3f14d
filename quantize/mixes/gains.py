"""What rounding under the Hessian leaves of what rounding to nearest costs: by kind of tensor, and by type.

Sensitivities are of errors to nearest, but files are rounded better, some types far more than others: one
whose blocks have a single free number gains more from error feedback than one that has two. So some rows of
some tensors are rounded both ways. Owns the sample, and its records, which survive a kill.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from models.tensor_types import TensorType
from quantize.gguf_files.mixed_file import MixedSource
from quantize.gguf_files.packing import FORMATS
from quantize.gguf_files.parts import Rows, StoredMatrices
from quantize.mixes.encoding import LEAST_GAIN, Best, one_thread
from quantize.network.hessian import input_of
from quantize.network.shape import kind_of
from quantize.processes import side_by_side
from quantize.steps import write_text

#: Tensors of a kind, evenly over the layers, and rows of each.
TENSORS, ROWS = 3, 96
#: Of the logarithm of what the loss falls by, how much the divergence's falls: the loss takes all tokens and
#: all outputs for alike. Measured on files of five sizes (docs/log.md).
EXPONENT = 0.5

Choices = Mapping[str, Mapping[str, int]]
Gains = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Sampler:
    """Rounds the sampled rows of some tensors; may be sent to another process."""

    source: MixedSource
    choices: Choices
    encode: Best
    folder: Path

    def __call__(self, names: Sequence[str]) -> None:
        """Record {type: [loss, loss of ggml's rounding]} of each, unless that is done."""
        for name in names:
            record = self.folder / f"{name}.json"
            if record.exists():
                continue
            rows, found = self._rows(name), {}
            for kind in self.choices[name]:
                if kind in FORMATS:
                    rounded = self.encode.rounded(replace(rows, type=kind))
                    found[kind] = [rounded.loss, rounded.baseline_loss]
            write_text(record, json.dumps(found))

    def _rows(self, name: str) -> Rows:
        tensor = next(each for each in self.source.tensors if each.name == name)
        stored = StoredMatrices(self.source.files[name], tensor, TensorType.Q8_0, None)
        whole = next(stored.blocks(whole_matrices=True))
        few = np.linspace(0, len(whole.weights) - 1, min(ROWS, len(whole.weights))).astype(int)
        return replace(whole, weights=whole.weights[few], n_rows=len(few))


def rounding_gains(
    sampler: Sampler, *, n_processes: int, progress: Callable[[int, int], None]
) -> dict[str, dict[str, float]]:
    """Kind of tensor -> type -> loss of our rounding over that of ggml's, geometric mean, at most 1.

    Types that ggml alone rounds are left out: they gain nothing.
    """
    sampler.folder.mkdir(parents=True, exist_ok=True)
    names = sampled(list(sampler.choices))
    groups: dict[str, list[str]] = {}
    for name in names:  # those that share a Hessian share the work on it
        groups.setdefault(input_of(name), []).append(name)
    done = 0
    for group in side_by_side(
        sampler, list(groups.values()), n_processes=n_processes, name="rounding samples", set_up=one_thread
    ):
        done += len(group)
        progress(done, len(names))
    logs: dict[str, dict[str, list[float]]] = {}
    for name in names:
        for kind, (loss, nearest) in json.loads((sampler.folder / f"{name}.json").read_text("utf-8")).items():
            if nearest > 0:
                gain = math.log(min(1.0, max(loss / nearest, LEAST_GAIN)))
                logs.setdefault(kind_of(name), {}).setdefault(kind, []).append(gain)
    return {
        part: {kind: math.exp(sum(found) / len(found)) for kind, found in types.items()}
        for part, types in logs.items()
    }


def sampled(names: Sequence[str]) -> list[str]:
    """TENSORS of each kind, evenly over those that there are."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(kind_of(name), []).append(name)
    found = []
    for alike in kinds.values():
        count = min(TENSORS, len(alike))
        found += [alike[(2 * index + 1) * len(alike) // (2 * count)] for index in range(count)]
    return found


def factor(gains: Gains, name: str, kind: str) -> float:
    """What a tensor's predicted divergence in a type is to be multiplied with."""
    return gains.get(kind_of(name), {}).get(kind, 1.0) ** EXPONENT
