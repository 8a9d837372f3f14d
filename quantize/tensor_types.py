"""ggml's tensor types: how many weights and bytes a block holds, and what each cannot hold.

A file's recipe, such as Q4_K_M, is made of these. Refuses to know how weights are rounded to them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import gguf
import numpy as np

from quantize.errors import QuantizeError


@dataclass(frozen=True, slots=True)
class TensorType:
    """One of ggml's tensor types: its number, and how many weights and bytes a block of it holds."""

    name: str
    number: int
    block_width: int
    block_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight takes, scales included."""
        return 8 * self.block_bytes / self.block_width

    def row_bytes(self, n: int) -> int:
        """Bytes of a row of `n` weights; raises where whole blocks do not fill it."""
        if n <= 0 or n % self.block_width:
            raise QuantizeError(
                f"{self.name} holds blocks of {self.block_width} weights, and rows of {n} are not filled by "
                "them; use a type of narrower blocks, such as Q8_0 or IQ4_NL (32), or F16 (1)"
            )
        return n // self.block_width * self.block_bytes


#: Name -> type, for every tensor type that weights can be rounded to. Recipes (`FTYPES`) are made of these.
TENSOR_TYPES: Mapping[str, TensorType] = {
    kind.name: TensorType(kind.name, int(kind), *gguf.GGML_QUANT_SIZES[kind])
    for kind in gguf.GGMLQuantizationType
    if kind.name not in {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"} and kind in gguf.GGML_QUANT_SIZES
}

#: Tensor types whose rounding asserts that there is an importance matrix.
NEED_IMPORTANCE = frozenset({"IQ2_XXS", "IQ2_XS", "IQ1_S"})

#: No format's float16 scale times its largest codes (Q6_K's 127 x 32) reaches further.
LARGEST_WEIGHT = 65504 * 127 * 32
WITHOUT_FLOAT16 = frozenset({"F32", "BF16", "MXFP4", "NVFP4"})


def tensor_type(name: str) -> TensorType:
    """The tensor type called `name`, such as Q4_K; raises for unknown names and recipes such as Q4_K_M."""
    if name not in TENSOR_TYPES:
        raise QuantizeError(f"{name!r} is not a tensor type of ggml; known: {', '.join(TENSOR_TYPES)}")
    return TENSOR_TYPES[name]


def checked_importance(importance: np.ndarray, n: int) -> np.ndarray:
    """(n,) float32, finite and positive: zeros become a millionth of the mean, or ones where all are 0."""
    values = np.ascontiguousarray(importance, np.float32)
    if values.shape != (n,):
        raise QuantizeError(f"importance has shape {values.shape}; rows of {n} weights need ({n},)")
    if not np.isfinite(values).all() or (values < 0).any():
        raise QuantizeError("importance holds numbers that are not finite, or negative; collect it anew")
    mean = float(values.mean(dtype=np.float64))
    return np.maximum(values, np.float32(1e-6 * mean)) if mean > 0 else np.ones_like(values)
