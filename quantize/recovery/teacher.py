"""What the source predicts, kept as the hidden states that its head makes logits of.

The last hidden states are computed once for all windows, one layer in memory at a time, and kept: the head
makes logits of them again at every use. That is exact, costs a fifth of its forward pass for a small
model and less for a large one, and takes n_embd numbers a token instead of n_vocab (85 times fewer for
SmolLM2), where keeping the largest probabilities alone would lose the tail.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantize.network.network import Network
from quantize.network.stream import Progress, blocks
from quantize.network.stream_state import StreamState

SAVE_S = 20.0


@dataclass(frozen=True, slots=True)
class Teacher:
    """The source's head, and what went into it: `normed` (windows, tokens, n_embd)."""

    network: Network
    normed: Tensor

    def log_probabilities(self, rows: Tensor) -> Tensor:
        """(positions, n_vocab) of (positions, n_embd)."""
        return self.network.logits_of(rows).log_softmax(-1)

    @classmethod
    def of(
        cls, network: Network, windows: np.ndarray, path: Path, key: str, progress: Progress | None = None
    ) -> "Teacher":
        """Of a source over (windows, tokens) ids; `path` keeps, under `key`, what is computed so far."""
        n_layer, saved = network.shape.n_layer, time.monotonic()
        state = StreamState(path, key)
        done, found = state.load() or (0, {})
        hidden = found.get("hidden")
        for done, hidden in _run(network, windows, done, hidden):  # noqa: B020 (goes on from there)
            if progress is not None:
                progress("predicting with the source", done, n_layer)
            if done == n_layer or time.monotonic() - saved > SAVE_S:
                state.save(done, {"hidden": hidden})
                saved = time.monotonic()
        assert hidden is not None
        hold_head(network)
        with torch.no_grad():
            return cls(network, network.norm(hidden.to(network.device)))


def _run(
    network: Network, windows: np.ndarray, done: int, hidden: Tensor | None
) -> Iterator[tuple[int, Tensor]]:
    """Layers computed and (windows, tokens, n_embd) after them, one layer in memory at a time."""
    with torch.no_grad():
        if hidden is None:
            hidden = network.embed(torch.from_numpy(windows).to(network.device))
        hidden = hidden.to(network.device)
        for index in range(done, network.shape.n_layer):
            layer = network.layer(index)
            for part in blocks(*windows.shape):
                hidden[part] = layer(hidden[part])
            yield index + 1, hidden


def hold_head(network: Network) -> None:
    """Read a network's head once."""
    network.replaced[network.head_name] = network.weight(network.head_name)
    if "output.bias" in network.file:
        network.replaced["output.bias"] = network.weight("output.bias")
