"""Write a GGUF without some of its layers: what stays is renumbered, and metadata of each goes along.

Owns which metadata has one value a layer. Models whose arithmetic hangs on the number of layers, or of which
that is not known, are refused. Which layers go is decided elsewhere.
"""

import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from models.atomic import whole
from models.gguf import Header, TensorInfo, read_header
from quantize.disk import DiskFull, disk_errors
from quantize.errors import QuantizeError
from quantize.gguf_files.header import Entry, Layout, Metadata, lay_out
from quantize.network.shape import (
    ARCHITECTURES,
    LAYERS_OF_GEMMA3_27B,
    UnsupportedNetwork,
    layer_of,
    read_shape,
)

#: Says in the file which layers of the source are left out, so that nobody has to guess.
NOTE = "lq.pruned_layers"
#: Values of a model of all its layers.
STALE = ("general.size_label",)
#: Keys, below the architecture, that may have one value a layer.
PER_LAYER = frozenset(
    {"attention.head_count", "attention.head_count_kv", "feed_forward_length"}
    | {"attention.sliding_window_pattern"}
)
WINDOW, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
COPY_BYTES = 16 << 20


class CannotPrune(QuantizeError):
    """Layers that cannot be left out of this model."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"--prune-layers: {path.name}: {reason}; leave the option out")


@dataclass(frozen=True, slots=True)
class Pruning:
    """A model's header and the layers to leave out, checked."""

    header: Header
    dropped: frozenset[int]

    @classmethod
    def of(cls, path: Path, dropped: Collection[int]) -> "Pruning":
        """Raises CannotPrune where the model would not be what it was without these layers."""
        header = read_header(path).require("model")
        made = cls(header, frozenset(dropped))
        made._check()
        return made

    @property
    def n_layer(self) -> int:
        """Layers of the source."""
        return int(self.header.hyperparameter("block_count") or 0)

    @property
    def kept(self) -> list[int]:
        """The source's numbers of the layers that stay, in order."""
        return [layer for layer in range(self.n_layer) if layer not in self.dropped]

    @property
    def tensors(self) -> list[TensorInfo]:
        """The source's tensors that stay."""
        return [tensor for tensor in self.header.tensors if layer_of(tensor.name) not in self.dropped]

    def layout(self) -> Layout:
        """The file that `write` makes, to the byte."""
        places = {old: new for new, old in enumerate(self.kept)}
        entries = [Entry(renamed(tensor.name, places), tensor.shape, tensor.type) for tensor in self.tensors]
        return lay_out(self._metadata(), entries, self.header.alignment)

    def write(self, out: Path) -> Header:
        """Write it; it appears whole or not at all."""
        with disk_errors(out), whole(out) as partial:
            self.write_plainly(partial)
        return read_header(out)

    def write_plainly(self, out: Path) -> None:
        """The same for a file that is deleted at once: nothing waits for the disk."""
        layout = self.layout()
        if shutil.disk_usage(out.parent).free < layout.size_bytes:
            raise DiskFull(out, f"it needs {layout.size_bytes / 1e6:.0f} MB")
        with self.header.path.open("rb") as source, out.open("wb") as file:
            file.write(layout.header)
            for tensor in self.tensors:
                _copy(source, file, tensor)
                file.write(bytes(-file.tell() % self.header.alignment))

    def _check(self) -> None:
        path, architecture = self.header.path, self.header.architecture
        if architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise CannotPrune(path, f"what hangs on the number of layers is known of {known} alone")
        try:
            read_shape(self.header)
        except UnsupportedNetwork as error:
            raise CannotPrune(path, str(error)) from None
        if strange := sorted(layer for layer in self.dropped if not 0 <= layer < self.n_layer):
            raise CannotPrune(
                path, f"it has the layers 0 to {self.n_layer - 1}, and {strange[0]} is none of them"
            )
        if not self.kept:
            raise CannotPrune(path, f"all of its {self.n_layer} layers would be gone")
        counts = (self.n_layer, len(self.kept))
        if architecture == "gemma3" and self.dropped and LAYERS_OF_GEMMA3_27B in counts:
            raise CannotPrune(
                path,
                f"llama.cpp scales gemma3's attention by whether it has {LAYERS_OF_GEMMA3_27B} layers",
            )
        for key, value in self.header.metadata.items():
            self._check_array(key, value)

    def _check_array(self, key: str, value: object) -> None:
        prefix = f"{self.header.architecture}."
        if not isinstance(value, list) or not key.startswith(prefix):
            return
        known = key.removeprefix(prefix) in PER_LAYER
        if known and len(value) != self.n_layer:
            raise CannotPrune(self.header.path, f"{key} has {len(value)} values for {self.n_layer} layers")
        if not known and len(value) == self.n_layer:
            raise CannotPrune(
                self.header.path, f"{key} may have a value for each of the layers, or mean something else"
            )

    @property
    def _slides_by_period(self) -> bool:
        """Whether layers have windows that no list in the file tells."""
        header = self.header
        has_windows = header.architecture == "gemma3" and bool(header.hyperparameter(WINDOW))
        return has_windows and not isinstance(header.hyperparameter(PATTERN), list)

    def _metadata(self) -> Metadata:
        path, prefix = self.header.path, f"{self.header.architecture}."
        metadata = Metadata.read(path).without(STALE if self.dropped else ())
        for key in sorted(PER_LAYER):
            if isinstance(self.header.hyperparameter(key), list):
                metadata = metadata.with_items(prefix + key, self.kept)
        if self._slides_by_period:  # which gaps would shift
            windows = read_shape(self.header).windows
            slides = [windows[layer] is not None for layer in self.kept]
            metadata = metadata.with_flags(prefix + PATTERN, slides)
        note = ",".join(str(layer) for layer in sorted(self.dropped))
        return metadata.updated({prefix + "block_count": len(self.kept)} | ({NOTE: note} if note else {}))


def renamed(name: str, places: dict[int, int]) -> str:
    """A tensor's name with the new number of its layer."""
    layer = layer_of(name)
    return name if layer is None else f"blk.{places[layer]}.{name.split('.', 2)[2]}"


def layer_elements(header: Header, layers: Sequence[int]) -> int:
    """Numbers in the tensors of these layers."""
    wanted = set(layers)
    return sum(tensor.n_elements for tensor in header.tensors if layer_of(tensor.name) in wanted)


def _copy(source: BinaryIO, file: BinaryIO, tensor: TensorInfo) -> None:
    source.seek(tensor.offset)
    left = tensor.size_bytes
    while left:
        data = source.read(min(left, COPY_BYTES))
        if not data:
            raise QuantizeError(f"{source.name} became shorter while it was read; run the same command again")
        file.write(data)
        left -= len(data)
