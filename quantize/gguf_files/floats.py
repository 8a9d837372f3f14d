"""Round float32 to what a GGUF stores: float16, or bfloat16 as the uint16 of its bits.

Knows no files and no quantized types; the way back is `models.tensors.to_float32`.
"""

from typing import Literal

import numpy as np

Dtype = Literal["F32", "F16", "BF16"]
ITEM_BYTES: dict[Dtype, int] = {"F32": 4, "F16": 2, "BF16": 2}
LARGEST_FLOAT16 = 65504.0


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
    """The GGUF name of what an array holds, float16, float32 or bfloat16's bits."""
    if stored.dtype == np.uint16:
        return "BF16"
    return "F16" if stored.itemsize == 2 else "F32"
