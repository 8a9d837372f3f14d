"""Which bytes of a model lie in the GPU's memory when so many of its layers do, as llama.cpp places them.

Layers go to the GPU from the last one back, the output head first, which counts as one; keys and values go
with their layer, and the tables that tokens are looked up in stay with the host. Arithmetic over headers.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from models.gguf import Header, TensorInfo

_BLOCK = re.compile(r"blk\.(\d+)\.")
#: Tables of the input, which llama.cpp never offloads.
_INPUT = ("token_embd.weight", "position_embd.weight", "token_types.weight", "per_layer_token_embd.weight")


@dataclass(frozen=True, slots=True)
class Bytes:
    """An amount of memory: the host's, and the GPU's own."""

    host: int
    device: int = 0

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(self.host + other.host, self.device + other.device)

    def __sub__(self, other: "Bytes") -> "Bytes":
        return Bytes(self.host - other.host, self.device - other.device)

    def within(self, room: "Bytes") -> bool:
        """Whether both fit."""
        return self.host <= room.host and self.device <= room.device


def n_layers(header: Header) -> int:
    """Layers that a GPU can take, the output head among them; 1 where the file does not count its blocks."""
    count = header.hyperparameter("block_count")
    return 1 + (count if isinstance(count, int) and count > 0 else 0)


def weights(pieces: Sequence[Header], gpu_layers: int) -> Bytes:
    """Bytes of the tensors. The head of a model that writes with its input table is a copy on the GPU."""
    tensors = [tensor for piece in pieces for tensor in piece.tensors]
    every = sum(tensor.size_bytes for tensor in tensors)
    if not gpu_layers:
        return Bytes(every)
    head = n_layers(pieces[0]) - 1
    first = head + 1 - gpu_layers
    device = sum(tensor.size_bytes for tensor in tensors if _layer(tensor, head) >= first)
    copy = sum(tensor.size_bytes for tensor in tensors if tensor.name == "token_embd.weight")
    has_head = any(tensor.name == "output.weight" for tensor in tensors)
    reads_only = pieces[0].is_encoder
    return Bytes(every - device, device + (0 if has_head or reads_only else copy))


def of_layers(sizes: Sequence[int], gpu_layers: int) -> int:
    """The GPU's part of what each layer takes, the output head left out, which is on the GPU first."""
    return sum(sizes[-(gpu_layers - 1) :]) if gpu_layers > 1 else 0


def largest_matrix(pieces: Sequence[Header]) -> int:
    """Bytes of the largest tensor of a layer; while it reads prompts, a GPU borrows those of the host."""
    blocks = (t.size_bytes for piece in pieces for t in piece.tensors if _BLOCK.match(t.name))
    return max(blocks, default=0)


def _layer(tensor: TensorInfo, head: int) -> int:
    """The number of the tensor's layer; -1: never on a GPU."""
    if match := _BLOCK.match(tensor.name):
        return int(match[1])
    return -1 if tensor.name in _INPUT else head
