"""The forward pass over many windows of text with one layer in memory at a time.

Each layer's inputs are kept, in memory or as bfloat16 on disk, for a backward pass that recomputes layers;
the inputs of its products can be summed up as Hessians on the way. Knows nothing of gradients.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.atomic import whole
from quantize.errors import QuantizeError
from quantize.network.hessian import Hessians, Moments
from quantize.network.network import Network

#: (what, tokens or layers done, in all)
Progress = Callable[[str, int, int], None]
BLOCK_TOKENS = 4096  # computed at once
IN_MEMORY_BYTES = 2 * 10**9  # of layer inputs; more go to disk


class TooFewTokens(QuantizeError):
    """Texts that are shorter than one window."""

    def __init__(self, size: int) -> None:
        super().__init__(
            f"none of the calibration sequences has {size} tokens, which one window takes; give longer texts "
            "or more --calibration-tokens"
        )


def cut(
    sequences: Sequence[Sequence[int]], size: int, *, limit: int | None = None, bos: int | None = None
) -> np.ndarray:
    """(windows, size) int64 of at most `limit` tokens, by default as many as there are; more are thinned out
    evenly.

    Each sequence gives as many windows as fit, the last one up to its end, overlapping if need be. With
    `bos`, every window begins with it.
    """
    room, found = size - (bos is not None), []
    for sequence in sequences:
        tokens = list(sequence[1:] if bos is not None and sequence[:1] == [bos] else sequence)
        starts = range(0, len(tokens) - room + 1, room)
        found += [tokens[start : start + room] for start in starts]
        if starts and len(tokens) % room:
            found.append(tokens[-room:])
    if not found:
        raise TooFewTokens(size)
    limit = sum(map(len, sequences)) if limit is None else limit
    wanted = max(1, limit // size)
    if len(found) > wanted:
        found = [found[i * len(found) // wanted] for i in range(wanted)]
    windows = np.array(found, np.int64)
    return windows if bos is None else np.insert(windows, 0, bos, axis=1)


def blocks(n_windows: int, size: int) -> Iterator[slice]:
    """Windows that are computed at once."""
    step = max(1, BLOCK_TOKENS // size)
    for start in range(0, n_windows, step):
        yield slice(start, min(start + step, n_windows))


def digest_of(*parts: object) -> str:
    """Hex digest of values and arrays."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return digest.hexdigest()


@dataclass(slots=True)
class LayerInputs:
    """Hidden states before each layer, and after the last: entries 0 to n_layer.

    Without a folder they stay in memory as they are; with one each is a bfloat16 file, found again by `key`.
    """

    folder: Path | None
    key: str
    shape: tuple[int, int, int]  # windows, tokens, n_embd
    _held: dict[int, Tensor] = field(default_factory=dict)

    def write(self, index: int, hidden: Tensor) -> None:
        """Keep one entry. What is stored rounded is rounded in `hidden` too: a pass that stopped and one that
        did not go on from the same."""
        if self.folder is None:
            self._held[index] = hidden.clone()
            return
        rounded = hidden.to(torch.bfloat16)
        hidden.copy_(rounded)
        bits = rounded.cpu().contiguous().view(torch.int16).numpy()
        with whole(self._path(index)) as partial, partial.open("wb") as file:
            bits.tofile(file)

    def has(self, index: int) -> bool:
        """Whether an entry is kept, maybe by an earlier process."""
        if self.folder is None:
            return index in self._held
        path = self._path(index)
        return path.exists() and path.stat().st_size == 2 * np.prod(self.shape)

    def read(self, index: int, part: slice = slice(None)) -> Tensor:
        """(windows, tokens, n_embd) of some windows, as stored."""
        if self.folder is None:
            return self._held[index][part]
        bits = np.memmap(self._path(index), np.int16, "r", shape=self.shape)[part]
        return torch.from_numpy(np.array(bits)).view(torch.bfloat16)

    def drop_all(self) -> None:
        """Forget all entries."""
        self._held.clear()
        if self.folder is not None:
            for path in self.folder.glob(f"inputs-{self.key[:16]}-*.bf16"):
                path.unlink()

    def _path(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"inputs-{self.key[:16]}-{index:03d}.bf16"


def inputs_for(network: Network, windows: np.ndarray, folder: Path, key: str) -> LayerInputs:
    """Where the inputs of all layers go: into memory if they are few, else below `folder`."""
    shape = (*windows.shape, network.shape.n_embd)
    needed = int(np.prod(shape)) * (network.shape.n_layer + 1) * network.dtype.itemsize
    return LayerInputs(folder if needed > IN_MEMORY_BYTES else None, key, shape)


def forward(
    network: Network,
    windows: np.ndarray,
    *,
    inputs: LayerInputs | None = None,
    hessians: Hessians | None = None,
    progress: Progress | None = None,
) -> None:
    """Run (windows, tokens) ids through all layers, keeping `inputs` and storing `hessians` where asked for.

    Goes on after the last layer whose inputs lie on disk; Hessians that are there are not made again.
    """
    n_layer = network.shape.n_layer
    missing = [i for i in range(n_layer) if hessians is not None and not hessians.has(i)]
    if inputs is None and hessians is not None and not missing and hessians.has(None):
        return
    first, hidden = _start(network, windows, inputs, min([n_layer, *missing]))
    with torch.no_grad():
        for index in range(first, n_layer):
            moments = Moments() if index in missing else None
            layer = network.layer(index)
            for part in blocks(*windows.shape):
                hidden[part] = layer(hidden[part], moments.tap if moments else None)
            if hessians is not None and moments is not None:
                hessians.write(index, moments)
            if inputs is not None:
                inputs.write(index + 1, hidden)
            if progress is not None:
                progress("reading the texts", index + 1, n_layer)
        if hessians is not None and not hessians.has(None):
            moments = Moments()
            for part in blocks(*windows.shape):
                normed = network.norm(hidden[part])
                moments.tap(network.head_name, normed, normed)
            hessians.write(None, moments)


def _start(
    network: Network, windows: np.ndarray, inputs: LayerInputs | None, last: int
) -> tuple[int, Tensor]:
    """The first layer to run, `last` or one before it, and what goes into it."""
    known = 0
    while inputs is not None and known <= last and inputs.has(known):
        known += 1
    if inputs is not None and known:
        return known - 1, inputs.read(known - 1).to(device=network.device, dtype=network.dtype)
    with torch.no_grad():
        hidden = network.embed(torch.from_numpy(windows).to(network.device))
    if inputs is not None:
        inputs.write(0, hidden)
    return 0, hidden
