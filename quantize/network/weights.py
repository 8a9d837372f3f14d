"""A GGUF's tensors as torch tensors, each read from the mapped file when it is asked for.

Knows what types mean, not what tensors do.
"""

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch

from models.gguf import Header, TensorInfo, read_header
from models.tensors import to_float32
from quantize.errors import QuantizeError


class UnreadableType(QuantizeError):
    """A tensor type that cannot be expanded."""

    def __init__(self, path: Path, info: TensorInfo) -> None:
        super().__init__(
            f"{path}: tensor {info.name} is stored as {info.type.name}, which cannot be expanded here; "
            "give the F32, F16 or BF16 GGUF"
        )


class NoSuchTensor(QuantizeError):
    """A name that the file does not have."""

    def __init__(self, path: Path, name: str) -> None:
        super().__init__(f"{path} has no tensor {name!r}")


class WeightFile:
    """An opened GGUF; shapes are torch's, (rows, row length)."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self._infos = {info.name: info for info in header.tensors}
        self._bytes = np.memmap(header.path, np.uint8, "r")

    @classmethod
    def open(cls, path: Path) -> "WeightFile":
        """Check the header and map the file; raises models.gguf.InvalidGGUF."""
        return cls(read_header(path))

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def shape(self, name: str) -> tuple[int, ...]:
        """(rows, row length), or (length,)."""
        return self._info(name).shape[::-1]

    def array(self, name: str) -> np.ndarray:
        """The tensor as a new float32 array."""
        info = self._info(name)
        stored = self._bytes[info.offset : info.offset + info.size_bytes]
        shape = info.shape[::-1]
        if info.type.name in ("F32", "F16", "BF16"):
            dtype = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[info.type.name]
            return np.array(to_float32(stored.view(dtype)), np.float32).reshape(shape)
        try:
            kind = gguf.GGMLQuantizationType[info.type.name]
            rows = np.ascontiguousarray(stored).reshape(-1, info.size_bytes // (info.n_elements // shape[-1]))
            return gguf.dequantize(rows, kind).reshape(shape)
        except (KeyError, NotImplementedError):
            raise UnreadableType(self.header.path, info) from None

    def read(self, name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
        """The tensor in `dtype` on `device`."""
        return torch.from_numpy(self.array(name)).to(device=device, dtype=dtype)

    def _info(self, name: str) -> TensorInfo:
        info = self._infos.get(name)
        if info is None:
            raise NoSuchTensor(self.header.path, name)
        return info
