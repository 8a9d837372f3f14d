"""Change the floating-point type of an array: what a checkpoint stores to what a GGUF stores.

Owns float32, float16 and bfloat16 (as the uint16 of its bits); knows no files and no quantized types.
"""

from typing import Literal

import numpy as np

Dtype = Literal["F32", "F16", "BF16"]
ITEM_BYTES: dict[Dtype, int] = {"F32": 4, "F16": 2, "BF16": 2}


def to_float32(stored: np.ndarray) -> np.ndarray:
    """Exact: every stored type is narrower than float32."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)


def from_float32(values: np.ndarray, dtype: Dtype) -> np.ndarray:
    """Round to the nearest value of `dtype`, ties to even; out of range becomes infinite."""
    if dtype == "F32":
        return values
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, (bits >> 16) | 64, rounded).astype(np.uint16)


def dtype_of(stored: np.ndarray) -> Dtype:
    """The GGUF name of what an array of `to_float32`'s input kind holds."""
    if stored.dtype == np.uint16:
        return "BF16"
    return "F16" if stored.itemsize == 2 else "F32"
