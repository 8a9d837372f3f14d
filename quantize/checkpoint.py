"""Open a Hugging Face checkpoint folder: its configuration and where each tensor lies.

Owns config.json, the shard index and reading rows of one tensor; refuses to know what a tensor means.
Only safetensors is read: pickled weights can run code.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.tensors import TensorFile
from quantize.errors import QuantizeError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
#: numpy has no bfloat16: its bits travel as uint16.
STORED: dict[str, np.dtype] = {"BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
BLOCK_BYTES = 8 << 20


class InvalidCheckpoint(QuantizeError):
    """A folder that holds no complete checkpoint; the message names the file and the remedy."""

    def __init__(self, path: Path, problem: str, remedy: str) -> None:
        super().__init__(f"{path}: {problem}; {remedy}")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in a safetensors file; `start` is its byte offset from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def n_elements(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        return self.n_elements * STORED[self.dtype].itemsize

    def read(self) -> np.ndarray:
        """The whole tensor as stored; BF16 as the uint16 of its bits."""
        return self._read(0, self.n_elements).reshape(self.shape)

    def blocks(self) -> Iterator[np.ndarray]:
        """The tensor in runs of whole rows, about BLOCK_BYTES each, as stored."""
        n_rows = self.shape[0] if self.shape else 1
        width = self.n_elements // max(n_rows, 1)
        step = _rows_a_block(self.size_bytes, n_rows)
        for first in range(0, n_rows, step):
            rows = min(step, n_rows - first)
            yield self._read(first * width, rows * width).reshape(rows, *self.shape[1:])

    def _read(self, first: int, count: int) -> np.ndarray:
        # Read, not mapped: mapped pages would count as ours for as long as the kernel keeps them.
        dtype = STORED[self.dtype]
        with self.file.open("rb") as file:
            file.seek(self.start + first * dtype.itemsize)
            values = np.fromfile(file, dtype=dtype, count=count)
        if values.size != count:
            raise InvalidCheckpoint(
                self.file, "the file became shorter while it was read", "download it again"
            )
        return values


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint folder; nothing of the tensors is in memory."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Read config.json and every shard's header; raises InvalidCheckpoint or InvalidSafetensors."""
        if not path.is_dir():
            raise InvalidCheckpoint(path, "is not a folder", "give the folder that holds config.json")
        config = read_json(path / "config.json")
        if config is None:
            raise InvalidCheckpoint(path, "holds no config.json", "give a Hugging Face checkpoint folder")
        tensors: dict[str, StoredTensor] = {}
        for file, names in _shards(path):
            found = _read_shard(file)
            _check_shard(file, names, found)
            tensors |= found
        return cls(path, config, tensors)


def row_blocks(values: np.ndarray) -> Iterator[np.ndarray]:
    """Views of an array in memory, in runs of whole rows of about BLOCK_BYTES."""
    step = _rows_a_block(values.nbytes, len(values))
    return (values[first : first + step] for first in range(0, len(values), step))


def _rows_a_block(size_bytes: int, n_rows: int) -> int:
    return max(1, n_rows * BLOCK_BYTES // max(1, size_bytes))


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None where there is no file."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(path, f"is not JSON ({error})", "download it again") from None
    if not isinstance(value, dict):
        raise InvalidCheckpoint(path, "is not a JSON object", "download it again")
    return value


def _shards(path: Path) -> list[tuple[Path, set[str] | None]]:
    """Each weight file with the tensor names it must hold (None where no index says)."""
    index = read_json(path / INDEX)
    if index is not None:
        return _indexed(path, index)
    if (path / SINGLE).is_file():
        return [(path / SINGLE, None)]
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1 and not re.search(r"-\d+-of-\d+$", files[0].stem):
        return [(files[0], None)]
    if files:
        raise InvalidCheckpoint(
            path, f"holds {len(files)} safetensors files but no {INDEX}", "download it too"
        )
    pickles = sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in path.glob(pattern))
    if pickles:
        raise InvalidCheckpoint(
            path,
            f"holds only pickled weights ({', '.join(pickles[:3])}), which can run code when opened",
            "save it as safetensors: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)",
        )
    raise InvalidCheckpoint(path, "holds no *.safetensors file", "download the checkpoint's weights")


def _indexed(path: Path, index: Mapping[str, Any]) -> list[tuple[Path, set[str] | None]]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidCheckpoint(path / INDEX, "has no weight_map", "download it again")
    shards: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise InvalidCheckpoint(path / INDEX, f"names {file!r} for tensor {name!r}", "download it again")
        shards.setdefault(file, set()).add(name)
    missing = sorted(file for file in shards if not (path / file).is_file())
    if missing:
        raise InvalidCheckpoint(
            path,
            f"{len(missing)} of {len(shards)} weight files are missing: {', '.join(missing)}",
            "download them",
        )
    return [(path / file, names) for file, names in sorted(shards.items())]


def _read_shard(file: Path) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(name, slot.dtype, slot.shape, file, slot.start)
        for name, slot in TensorFile.open(file).slots.items()
    }


def _check_shard(file: Path, names: set[str] | None, found: Mapping[str, StoredTensor]) -> None:
    if names is None or names == found.keys():
        return
    absent, extra = sorted(names - found.keys()), sorted(found.keys() - names)
    detail = f"lacks tensor {absent[0]!r}" if absent else f"holds tensor {extra[0]!r}, which"
    problem = f"{detail} that {INDEX} promises" if absent else f"{detail} {INDEX} does not name"
    raise InvalidCheckpoint(file, problem, "download the folder again, all of one revision")
