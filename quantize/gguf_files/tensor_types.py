"""ggml's tensor types: how many weights and bytes a block holds, and what each cannot hold.

A file's recipe, such as Q4_K_M, is made of these. Refuses to know how weights are rounded to them.
"""

import numpy as np

from models.tensor_types import TensorType
from quantize.errors import QuantizeError
from quantize.gguf_files.floats import LARGEST_FLOAT16

#: What llama.cpp multiplies with within, numbers that are no weights, and what gguf cannot read yet.
NOT_FOR_WEIGHTS = frozenset({"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "Q2_0"})
#: Every type that weights can be rounded to. Recipes (`FTYPES`) are made of these.
FOR_WEIGHTS = tuple(kind.name for kind in TensorType if kind.name not in NOT_FOR_WEIGHTS)

#: Tensor types whose rounding asserts that there is an importance matrix.
NEED_IMPORTANCE = frozenset({"IQ2_XXS", "IQ2_XS", "IQ1_S"})

#: No format's float16 scale times its largest codes (Q6_K's 127 x 32) reaches further.
LARGEST_WEIGHT = LARGEST_FLOAT16 * 127 * 32
WITHOUT_FLOAT16 = frozenset({"F32", "BF16", "MXFP4", "NVFP4"})


def tensor_type(name: str) -> TensorType:
    """The tensor type called `name`, such as Q4_K; raises for unknown names and recipes such as Q4_K_M."""
    if name not in FOR_WEIGHTS:
        raise QuantizeError(f"{name!r} is not a tensor type of ggml; known: {', '.join(FOR_WEIGHTS)}")
    return TensorType[name]


def row_bytes(kind: TensorType, n: int) -> int:
    """Bytes of a row of `n` weights; raises where whole blocks do not fill it."""
    if n <= 0 or n % kind.block_elements:
        raise QuantizeError(
            f"{kind.name} holds blocks of {kind.block_elements} weights, and rows of {n} are not filled by "
            "them; use a type of narrower blocks, such as Q8_0 or IQ4_NL (32), or F16 (1)"
        )
    return n // kind.block_elements * kind.block_bytes


def checked_importance(importance: np.ndarray, n: int) -> np.ndarray:
    """(n,) float32, finite and positive: zeros become a millionth of the mean, or ones where all are 0."""
    values = np.ascontiguousarray(importance, np.float32)
    if values.shape != (n,):
        raise QuantizeError(f"importance has shape {values.shape}; rows of {n} weights need ({n},)")
    if not np.isfinite(values).all() or (values < 0).any():
        raise QuantizeError("importance holds numbers that are not finite, or negative; collect it anew")
    mean = float(values.mean(dtype=np.float64))
    return np.maximum(values, np.float32(1e-6 * mean)) if mean > 0 else np.ones_like(values)
