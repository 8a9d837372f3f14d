"""Read safetensors files: header checked against the file, one tensor at a time as float32.

The safetensors package reads bfloat16 only into torch; adapters are small and need numpy alone.
Refuses to know which tensors mean what.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import ModelsError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_ELEMENT_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class InvalidSafetensors(ModelsError):
    """A file that is no complete safetensors file; the message says what is wrong."""

    def __init__(self, path: Path, problem: str, *, remedy: str = "download or save it again") -> None:
        super().__init__(f"{path}: not a valid safetensors file: {problem}; {remedy}")


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor lies: `start` and `end` are byte offsets from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def n_elements(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class TensorFile:
    """An opened safetensors file: its table; tensors are read when asked for."""

    path: Path
    slots: Mapping[str, Slot]

    @classmethod
    def open(cls, path: Path) -> "TensorFile":
        """Read and check the header; raises InvalidSafetensors."""
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > MAX_HEADER_BYTES:
                raise InvalidSafetensors(path, f"its header claims {length} bytes")
            if 8 + length > size:
                raise InvalidSafetensors(path, f"truncated: needs {8 + length} bytes, has {size}")
            header = _decode(path, file.read(length))
        header.pop("__metadata__", None)
        return cls(path, {name: _slot(path, name, entry, 8 + length, size) for name, entry in header.items()})

    def read(self, name: str) -> np.ndarray:
        """The tensor as a new float32 array."""
        slot = self.slots[name]
        if slot.dtype not in _FLOATS:
            raise InvalidSafetensors(
                self.path,
                f"tensor {name!r} is stored as {slot.dtype}",
                remedy="float32, float16 or bfloat16 is needed; save it unquantized",
            )
        with self.path.open("rb") as file:
            file.seek(slot.start)
            raw = np.fromfile(file, dtype=_FLOATS[slot.dtype], count=slot.n_elements)
        return to_float32(raw).reshape(slot.shape)


def to_float32(stored: np.ndarray) -> np.ndarray:
    """Numbers as float32; bfloat16, which numpy does not have, comes as the uint16 of its bits."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)


def _decode(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidSafetensors(path, f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise InvalidSafetensors(path, "its header is not a JSON object")
    return header


def _slot(path: Path, name: str, entry: Any, data_start: int, size: int) -> Slot:
    broken = InvalidSafetensors(path, f"the entry of tensor {name!r} contradicts itself")
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        start, end = entry["data_offsets"]
        expected = math.prod(shape) * _ELEMENT_BYTES[dtype]
        sound = all(type(n) is int and n >= 0 for n in (*shape, start, end)) and end - start == expected
    except (KeyError, TypeError, ValueError):
        raise broken from None
    if not sound:
        raise broken
    if data_start + end > size:
        raise InvalidSafetensors(
            path, f"truncated: tensor {name!r} ends at byte {data_start + end}, the file has {size}"
        )
    return Slot(dtype, shape, data_start + start, data_start + end)
