"""What training a file takes of memory, told before the work: kept layers, computed again, or refused.

An upper estimate from headers alone.
"""

from pathlib import Path

import numpy as np
import torch

from engine.memory import available_memory
from models.gguf import Header, TensorInfo, read_header
from quantize.errors import QuantizeError
from quantize.gguf_files.packing import FORMATS
from quantize.network.network import EMBEDDING, OUTPUT, Network
from quantize.network.shape import layer_of
from quantize.recovery.loss import LOGITS
from quantize.recovery.student import is_trained
from quantize.recovery.training import TOKENS

#: Of what is free; the rest is for torch's own buffers.
SHARE = 0.9
#: float32 numbers of a knob: start, unit, offset, gradient, two moments, the best; and the tensor in use.
OF_A_KNOB = 4 * 8
#: Arrays of logits in float32 that one chunk of positions takes on the way there and back.
LOGIT_ARRAYS = 8


class NoMemory(QuantizeError):
    """A model that cannot be trained here."""

    def __init__(self, path: Path, needed: int, free: int, device: str) -> None:
        where = "GPU memory" if device.startswith("cuda") else "memory"
        super().__init__(
            f"recovering {path.name} needs about {needed / 1e9:.1f} GB of {where} (its codes, a layer's "
            f"weights and gradients, the head of its source), and {free / 1e9:.1f} GB are free; free some, "
            "use a machine with more, or leave --recover out"
        )


def is_lean(source: Network, quantized: Path, windows: np.ndarray, device: str) -> bool:
    """Whether layers must be computed again on the way back; raises NoMemory if even that does not fit."""
    header = read_header(quantized)
    free = int(SHARE * free_memory(device))
    kept = source.shape.n_embd * windows.size * 4 + 4 * header_elements(source.file.header, source.head_name)
    n_tokens = max(TOKENS, windows.shape[1])
    if kept + needed(header, n_tokens, lean=False) <= free:
        return False
    least = kept + needed(header, n_tokens, lean=True)
    if least > free:
        raise NoMemory(quantized, least, free, device)
    return True


def free_memory(device: str) -> int:
    """Bytes."""
    return torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else available_memory()


def needed(header: Header, n_tokens: int, *, lean: bool) -> int:
    """Bytes to train a file with so many tokens computed at once."""
    held = sum(_held(tensor) for tensor in header.tensors)
    layers: dict[int | None, int] = {}
    for tensor in header.tensors:
        layer = layer_of(tensor.name)
        layers[layer] = layers.get(layer, 0) + 4 * tensor.n_elements
    by_layer = [size for layer, size in layers.items() if layer is not None] or [0]
    head = 4 * header_elements(header, OUTPUT if any(t.name == OUTPUT for t in header.tensors) else EMBEDDING)
    # weights and activations of the layers that are kept, and gradients of one
    kept = max(by_layer) if lean else sum(by_layer)
    activations = n_tokens * _activations(header) * (1 if lean else len(by_layer))
    return held + kept + 2 * max(by_layer) + activations + 4 * head + 4 * LOGITS * LOGIT_ARRAYS


def header_elements(header: Header, name: str) -> int:
    """Numbers in a tensor."""
    return next((tensor.n_elements for tensor in header.tensors if tensor.name == name), 0)


def _held(tensor: TensorInfo) -> int:
    """Bytes that are there all the time."""
    if not is_trained(tensor):
        return 4 * tensor.n_elements
    form = FORMATS.get(tensor.type.name)
    if form is None:
        return OF_A_KNOB * tensor.n_elements
    knobs = (1 + form.has_minimum) * tensor.n_elements // form.block + tensor.n_elements // tensor.shape[0]
    groups = 0 if form.scales is None else (1 + form.has_minimum) * tensor.n_elements // form.group
    return tensor.n_elements + OF_A_KNOB * knobs + 2 * groups


def _activations(header: Header) -> int:
    """Bytes a token of one layer: what its products, norms and gates keep for the way back."""
    rows = [
        tensor.shape for tensor in header.tensors if layer_of(tensor.name) == 0 and len(tensor.shape) == 2
    ]
    return 4 * 3 * sum(width + height for width, height, *_ in rows)
