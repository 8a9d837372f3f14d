"""ggml's tensor as the eval callback hands it over, read through ctypes.

The layout is that of `struct ggml_tensor` in ggml.h at the pinned llama.cpp;
`tests/engine/test_native_model.py` notices when it moves. Knows no graph, no model: one tensor, its sources,
its values.
"""

import ctypes
from collections.abc import Callable

import numpy as np

OP_MUL_MAT, OP_MUL_MAT_ID, OP_GET_ROWS = 29, 30, 40
TYPE_F32, TYPE_I32 = 0, 26

#: Copies `size` bytes of a tensor, wherever it lives, into host memory: (tensor, target, offset, size).
Reader = Callable[[int, int, int, int], None]


class Tensor(ctypes.Structure):
    """struct ggml_tensor; `ne` are elements a dimension, fastest first, `nb` their strides in bytes."""

    name_bytes: bytes
    type: int
    op: int

    @property
    def name(self) -> str:
        return self.name_bytes.decode("utf-8", "replace")

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements a dimension, fastest first, always four."""
        return tuple(self.ne)

    def source(self, index: int) -> "Tensor | None":
        """What the tensor was computed from."""
        address = self.src[index]
        return Tensor.from_address(address) if address else None


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.c_void_p * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name_bytes", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]


class TensorView:
    """One computed tensor, of a product `weight x input` its sources too; values are copied to the host."""

    def __init__(self, tensor: Tensor, read: Reader) -> None:
        self.tensor = tensor
        self._read = read

    @property
    def op(self) -> int:
        return self.tensor.op

    @property
    def weight(self) -> Tensor:
        """The first source: the weight matrix of a product, the table of a lookup."""
        source = self.tensor.source(0)
        assert source is not None
        return source

    @property
    def inputs(self) -> np.ndarray:
        """The second source as (batches, rows, n) float32."""
        source = self.tensor.source(1)
        assert source is not None
        return self.matrices(source)

    @property
    def experts(self) -> np.ndarray:
        """Of MUL_MAT_ID: the expert of each (token, choice), int32."""
        source = self.tensor.source(2)
        assert source is not None
        n, rows, *_ = source.shape
        return self.values(source, np.int32).reshape(rows, n)

    def matrices(self, tensor: Tensor) -> np.ndarray:
        """A tensor as (batches, rows, n) float32."""
        n, rows, *batches = tensor.shape
        return self.values(tensor, np.float32).reshape(batches[0] * batches[1], rows, n)

    def values(self, tensor: Tensor, kind: type[np.generic]) -> np.ndarray:
        """All values of a tensor of four-byte elements, contiguous, slowest dimension first."""
        item = np.dtype(kind).itemsize
        assert tensor.nb[0] == item, f"{tensor.name} has elements of {tensor.nb[0]} bytes, not {item}"
        shape = tensor.shape[::-1]
        span = sum((count - 1) * stride for count, stride in zip(tensor.ne, tensor.nb, strict=True)) + item
        raw = np.empty(span, np.uint8)
        self._read(ctypes.addressof(tensor), raw.ctypes.data, 0, span)
        strides = tuple(tensor.nb)[::-1]
        return np.ascontiguousarray(np.ndarray(shape, kind, raw.data, strides=strides))
