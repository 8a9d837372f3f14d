"""A quantized GGUF as a network whose norms, biases and block scales are trained, its codes fixed.

Owns which tensors have knobs, and writes the file with the knobs' numbers in place of the old ones. Knows no
loss.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.atomic import whole
from models.gguf import TensorInfo
from quantize.errors import QuantizeError
from quantize.gguf_files.packing import FORMATS
from quantize.network.network import Network
from quantize.network.shape import read_shape
from quantize.network.weights import WeightFile
from quantize.recovery.knobs import Knob, as_half, minimum_knob, row_knob, scale_knob, vector_knob
from quantize.recovery.scales import Packed, expand, rewrite

SCALE, MINIMUM, ROWS = "scale", "minimum", "rows"


class NothingToTrain(QuantizeError):
    """A file without a single number that can be trained."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path}: it holds no float32 norms and none of the types {', '.join(FORMATS)}, so there is "
            "nothing to recover with; leave --recover out"
        )


class BrokenScales(QuantizeError):
    """A file that holds NaN or infinity where numbers are trained."""

    def __init__(self, path: Path, name: str) -> None:
        super().__init__(f"{path}: tensor {name} holds NaN or infinity; make the file anew")


class Student(Network):
    """A network that gives weights as its knobs have them. `knobs` are by (tensor, "scale" or "minimum").

    `lean`: layers are computed again on the way back instead of kept. Other tensors are held as float32.
    """

    def __init__(self, path: Path, *, device: str = "cpu", lean: bool = False) -> None:
        file = WeightFile.open(path)
        super().__init__(file, read_shape(file.header), dtype=torch.float32, device=device, keep=True)
        self.lean = lean
        self.packed: dict[str, Packed] = {}
        self.knobs: dict[tuple[str, str], Knob] = {}
        self._stored = False
        for info in file.header.tensors:
            self._prepare(info)
        if not self.knobs:
            raise NothingToTrain(path)

    def _prepare(self, info: TensorInfo) -> None:
        """The knobs of a tensor, where it has any."""
        if is_vector(info):
            found = {SCALE: vector_knob(self.file.read(info.name, device=self.device))}
        elif info.type.name in FORMATS:
            packed = Packed.of(FORMATS[info.type.name], _rows(self._map(), info), self.device)
            self.packed[info.name] = packed
            found = {SCALE: scale_knob(packed), MINIMUM: minimum_knob(packed), ROWS: row_knob(packed)}
        else:
            return
        for part, knob in found.items():
            if knob is None:
                continue
            if not torch.isfinite(knob.start).all():
                raise BrokenScales(self.file.header.path, info.name)
            self.knobs[info.name, part] = knob

    def _map(self) -> np.ndarray:
        return np.memmap(self.file.header.path, np.uint8, "r")

    def weight(self, name: str) -> Tensor:
        """A weight: its replacement, what its knobs make it, or the file's."""
        if name in self.replaced or (name, SCALE) not in self.knobs:
            return super().weight(name)
        if name not in self.packed:
            return self.knobs[name, SCALE].value()
        return expand(self.packed[name], *self._numbers(name))

    def _numbers(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Scales and minimums of a packed tensor, (rows, blocks) each."""
        rows, minimum = self.knobs[name, ROWS].value(), self.knobs.get((name, MINIMUM))
        found = [rows * knob.value() for knob in (self.knobs[name, SCALE], minimum) if knob is not None]
        scale, *more = map(as_half, found) if self._stored else found
        return scale, more[0] if more else None

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """Within, weights are those of the file that `write` would make, and nothing is differentiated."""
        self._stored = True
        try:
            with torch.no_grad():
                yield
        finally:
            self._stored = False

    def run(self, tokens: Tensor) -> Tensor:
        """(batch, tokens, n_embd) of (batch, tokens) ids: what the head is multiplied with."""
        hidden = self.embed(tokens)
        for index in range(self.shape.n_layer):
            if self.lean and torch.is_grad_enabled():
                hidden = checkpoint(self._layer, index, hidden, use_reentrant=False)
                assert isinstance(hidden, Tensor)
            else:
                hidden = self._layer(index, hidden)
        return self.norm(hidden)

    def _layer(self, index: int, hidden: Tensor) -> Tensor:
        return self.layer(index)(hidden)

    def write(self, out: Path) -> None:
        """A copy of the file with the knobs' numbers in their places; it is whole or not there."""
        source = self.file.header.path
        with whole(out) as partial:
            shutil.copyfile(source, partial)
            data = np.memmap(partial, np.uint8, "r+")
            for info in self.file.header.tensors:
                if (info.name, SCALE) in self.knobs:
                    _rows(data, info)[:] = self._bytes(info, _rows(data, info))
            data.flush()
            del data

    def _bytes(self, info: TensorInfo, old: np.ndarray) -> np.ndarray:
        """What the file will hold of one tensor, (rows, row_bytes) uint8."""
        if info.name not in self.packed:
            values = self.knobs[info.name, SCALE].value().detach().cpu().numpy()
            return np.ascontiguousarray(values, "<f4").view(np.uint8).reshape(old.shape)
        with self.as_stored():
            scale, minimum = (
                None if part is None else part.cpu().numpy().astype(np.float16)
                for part in self._numbers(info.name)
            )
        assert scale is not None
        return rewrite(FORMATS[info.type.name], old, scale, minimum)


def is_vector(info: TensorInfo) -> bool:
    """A norm's weights or a bias, in float32. Factors of rotary frequencies are none of them."""
    return len(info.shape) == 1 and info.type.name == "F32" and not info.name.startswith("rope_")


def is_trained(info: TensorInfo) -> bool:
    """Whether a tensor has knobs."""
    return is_vector(info) or info.type.name in FORMATS


def _rows(data: np.ndarray, info: TensorInfo) -> np.ndarray:
    """A tensor's bytes in the mapped file, (rows, row_bytes)."""
    rows = info.n_elements // info.shape[0]
    return data[info.offset : info.offset + info.size_bytes].reshape(rows, -1)
