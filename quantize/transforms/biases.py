"""Biases that make up for the mean error of rounded weights: b + (W - W') E[x], where a model can have them.

What rounding does to the mean of a product's output is known in closed form, and a bias takes it away. Nagel
et al., 2019. Owns which products may have one and how those of a finished file are corrected.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from models.gguf import Header, TensorInfo, read_header
from quantize.errors import QuantizeError
from quantize.network.network import EMBEDDING, OUTPUT
from quantize.network.weights import WeightFile

#: Products to which llama.cpp's graph of an architecture adds a bias where the file has one; of other
#: architectures only those that have one already get a better one.
OPTIONAL = {
    "llama": frozenset({"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}),
}


class NotFloat32(QuantizeError):
    """A bias that cannot be written over."""

    def __init__(self, path: Path, tensor: TensorInfo) -> None:
        super().__init__(
            f"{path}: {tensor.name} is {tensor.type.name}, and biases are corrected in F32 alone"
        )


def may_have_bias(header: Header, weight: str) -> bool:
    """Whether the product with a weight has a bias, or would have one if the file did."""
    if weight in (EMBEDDING, OUTPUT) or not weight.endswith(".weight"):
        return False
    head = weight.removesuffix(".weight")
    optional = OPTIONAL.get(str(header.architecture), frozenset())
    return head.rpartition(".")[2] in optional or any(t.name == f"{head}.bias" for t in header.tensors)


def correct(source: Path, rounded: Path, mean: Callable[[str], np.ndarray]) -> None:
    """Write all biases of `rounded` anew, in the file itself, from those of the source that it was made from.

    `mean`: weight -> E[x] of what it reads, (n,). The embedding and the head keep theirs.
    """
    true, made = WeightFile.open(source), WeightFile.open(rounded)
    tensors = {tensor.name: tensor for tensor in read_header(rounded).tensors}
    found: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        weight = name.removesuffix("bias") + "weight"
        if not name.endswith(".bias") or weight in (EMBEDDING, OUTPUT) or weight not in tensors:
            continue
        if tensor.type.name != "F32":
            raise NotFloat32(rounded, tensor)
        error = true.array(weight) - made.array(weight)
        found[name] = true.array(name) + error.astype(np.float64) @ mean(weight).astype(np.float64)
    with rounded.open("r+b") as file:
        for name, bias in found.items():
            file.seek(tensors[name].offset)
            file.write(bias.astype("<f4").tobytes())
