"""Round a mix's tensors in the order of its layers, each for what the rounded ones before it really put out.

Rounded on their own, errors of all layers add up. Here every tensor is rounded for the inputs that it will
get, towards weights that make up for what those lack (`quantize.network.drift`). Owns the order and what lies
on disk meanwhile; what is rounded stays in parts, so a run that was killed goes on.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.atomic import whole
from quantize.gguf_files.packing import FORMATS
from quantize.gguf_files.parts import Encode, Parts, Rows, StoredMatrices
from quantize.gguf_files.types import quantize_rows
from quantize.mixes.encoding import one_thread
from quantize.network.drift import Drift, side_by_side
from quantize.network.hessian import input_of
from quantize.network.network import EMBEDDING, Layer, Network
from quantize.network.stream import blocks
from quantize.network.stream_state import StreamState
from quantize.processes import Processes
from quantize.rounding.curvature import Curvature, prepare
from quantize.rounding.matrix import round_matrix

#: Changes when the same inputs come to other bytes; not for sums' last bits, which CPUs differ in too.
VERSION = 2
SAVE_S = 60.0

#: (tensor, layers done, layers in all)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Targets:
    """What tensors are rounded towards, in a folder, one file for those that share an input."""

    folder: Path

    def write(self, name: str, drift: Drift) -> None:
        """Of the product, or products, that read the input stored under this name."""
        change, missing = drift.correction()
        tensors = {"moments": drift.moments, "change": change}
        if missing is not None:
            tensors["missing"] = missing
        with whole(self._path(name)) as partial:
            save_file(
                {key: value.contiguous() for key, value in tensors.items()},
                partial,
                metadata={"tokens": str(drift.n_tokens)},
            )

    def drop(self, name: str) -> None:
        """Forget it."""
        self._path(name).unlink(missing_ok=True)

    def read(self, name: str, key: str) -> np.ndarray | None:
        """One of the arrays, float32."""
        with safe_open(self._path(name), "numpy") as file:
            return file.get_tensor(key) if key in file.keys() else None  # noqa: SIM118 (no dict)

    def n_tokens(self, name: str) -> int:
        """Tokens that all are means over."""
        with safe_open(self._path(name), "numpy") as file:
            return int(file.metadata()["tokens"])

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


@dataclass(slots=True)
class Towards:
    """Rounds whole matrices towards their `targets`; may be sent to another process."""

    targets: Targets
    _last: tuple[str, Curvature] | None = field(default=None, compare=False)

    def __call__(self, rows: Rows) -> np.ndarray:
        """(rows, row_bytes) uint8."""
        name = input_of(rows.tensor)
        weights = rows.weights + rows.weights @ self._array(name, "change")
        if (missing := self.targets.read(name, "missing")) is not None:
            weights += missing
        curvature = self._curvature(name)
        if rows.type in FORMATS:
            return round_matrix(weights, rows.type, hessian=curvature).data
        return quantize_rows(rows.type, weights, curvature.plain.diagonal().numpy().copy())

    def _curvature(self, name: str) -> Curvature:
        if self._last is None or self._last[0] != name:
            self._last = None  # two large ones are never there at once
            moments = self._array(name, "moments")
            self._last = name, prepare(moments, n_tokens=self.targets.n_tokens(name))
        return self._last[1]

    def _array(self, name: str, key: str) -> np.ndarray:
        found = self.targets.read(name, key)
        assert found is not None
        return found


@dataclass(frozen=True, slots=True)
class _Make:
    """One tensor into its part; sent to the processes."""

    parts: Parts
    encode: Encode

    def __call__(self, wanted: StoredMatrices) -> None:
        self.parts.make(wanted, self.encode, whole_matrices=True)


@dataclass(frozen=True, slots=True)
class InOrder:
    """One mix: `wanted` are its tensors by name, `settled` those that stay as they are rounded already.

    `folder` is for what lies there meanwhile; `key` says what all of it depends on.
    """

    source: Path
    wanted: Mapping[str, StoredMatrices]
    settled: frozenset[str]
    parts: Parts
    folder: Path
    key: str
    n_processes: int
    progress: Progress

    def run(self, windows: np.ndarray) -> None:
        """Make all parts, from what (windows, tokens) ids of text say of each layer."""
        self.folder.mkdir(parents=True, exist_ok=True)
        network = Network.open(self.source)
        state = StreamState(self.folder / "streams.safetensors", self.key)
        targets = Targets(self.folder)
        n_layer, saved = network.shape.n_layer, time.monotonic()
        with (
            torch.no_grad(),
            Processes(
                _Make(self.parts, Towards(targets)), self.n_processes, "rounding tensors", one_thread
            ) as processes,
        ):
            first, hidden, made = self._start(network, windows, state)
            for index in range(first, n_layer):
                self.progress(f"layer {index}", index, n_layer)
                layer = network.layer(index)
                for group in side_by_side(network.layer(index), layer, hidden, made):
                    self._round(group.names, group.drift, targets, processes)
                    self._take(layer, group.names)
                if time.monotonic() - saved > SAVE_S:
                    state.save(index + 1, {"source": hidden, "made": made})
                    saved = time.monotonic()
            if not network.is_tied:
                self._round_head(network, hidden, made, targets, processes)
        state.path.unlink(missing_ok=True)

    def _start(self, network: Network, windows: np.ndarray, state: StreamState) -> tuple[int, Tensor, Tensor]:
        """The first layer to do, and both streams before it."""
        if (found := state.load()) is not None:
            index, streams = found
            return index, streams["source"], streams["made"]
        ids = torch.from_numpy(windows)
        hidden = network.embed(ids)
        if EMBEDDING not in self.wanted or self.wanted[EMBEDDING].key is None:
            return 0, hidden, hidden.clone()
        network.replaced[EMBEDDING] = self._values(EMBEDDING)
        made = network.embed(ids)
        del network.replaced[EMBEDDING]
        return 0, hidden, made

    def _round(
        self,
        group: Sequence[str],
        drift: Callable[[], Drift],
        targets: Targets,
        processes: Processes,
    ) -> None:
        """Make those parts of a group that are not there."""
        missing = [
            self.wanted[name]
            for name in group
            if name in self.wanted
            and name not in self.settled
            and self.wanted[name].key is not None
            and not self.parts.has(self.wanted[name])
        ]
        if not missing:
            return
        name = input_of(group[0])
        targets.write(name, drift())
        for _ in processes.each(missing):
            pass
        targets.drop(name)

    def _round_head(
        self, network: Network, hidden: Tensor, made: Tensor, targets: Targets, processes: Processes
    ) -> None:
        """The last product, where it is not the embedding's."""

        def inputs(stream: Tensor, part: slice) -> Tensor:
            return network.norm(stream[part]).flatten(0, 1)

        def drift() -> Drift:
            parts = blocks(*hidden.shape[:2])
            return Drift.over((inputs(hidden, part), inputs(made, part), None) for part in parts)

        self._round([network.head_name], drift, targets, processes)

    def _take(self, layer: Layer, group: Sequence[str]) -> None:
        """Give a layer the weights of a group as they were rounded."""
        for name in group:
            if name in self.wanted and self.wanted[name].key is not None:
                layer.weights[name] = self._values(name)

    def _values(self, name: str) -> Tensor:
        """(rows, n) float32 of a finished part."""
        wanted = self.wanted[name]
        data = np.fromfile(self.parts.path(wanted), np.uint8).reshape(-1, wanted.row_bytes)
        kind = gguf.GGMLQuantizationType[wanted.type.name]
        return torch.from_numpy(np.ascontiguousarray(gguf.dequantize(data, kind), np.float32))
