"""What it costs that CPU kernels round the inputs of products too: to 8 bits, in blocks that go by the type.

A block's numbers are multiples of its largest over 127. Blocks are of 32 numbers for most types of the same
blocks and of 256 for K-quants and their like (ggml's `vec_dot_type`), where one large number in 256 takes the
digits of all others. GPU kernels use 32 for all.
"""

from torch import Tensor

from models.tensor_types import TensorType

#: Numbers of a block; no more are known to ggml.
BLOCKS = (32, 256)


def input_block(kind: str) -> int | None:
    """Numbers of a block of inputs to products with weights of a type; None where no block is rounded."""
    size = TensorType[kind].block_elements
    return size if size in BLOCKS else None


def rounded(x: Tensor, block: int) -> Tensor:
    """(…, n) inputs as CPU kernels take them; n is a multiple of `block`."""
    blocks = x.unflatten(-1, (-1, block))
    unit = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / unit.where(unit > 0, 1.0)).round() * unit).flatten(-2)


def project_inputs(by_inputs: Tensor, inputs: Tensor) -> Tensor:
    """<gradient by a sample's inputs, what rounding them adds>, (samples, BLOCKS); 0 for blocks that no row
    fits. Both are (samples, tokens, n)."""
    found = by_inputs.new_zeros(len(inputs), len(BLOCKS))
    for column, block in enumerate(BLOCKS):
        if inputs.shape[-1] % block == 0:
            found[:, column] = ((rounded(inputs, block) - inputs) * by_inputs).sum((1, 2))
    return found
