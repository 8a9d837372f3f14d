"""Check a GGUF header and describe the file, before llama.cpp sees it.

llama.cpp trusts much of what a file says; this does not. Reads the header only, never tensor data.
Refuses to know what the tensors compute.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from models.gguf_reader import Cursor, InvalidGGUF
from models.tensor_types import TensorType

__all__ = ["Header", "InvalidGGUF", "TensorInfo", "read_header"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_KEY_BYTES = 1 << 16
MAX_NAME_BYTES = 63  # GGML_MAX_NAME less the terminator
MAX_DIMENSIONS = 4
MAX_BYTES = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: `shape` in ggml order (ne0, the row length, first); `offset` from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int
    size_bytes: int

    @property
    def n_elements(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file says of itself; every tensor lies within the file."""

    path: Path
    version: int
    alignment: int
    metadata: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    size_bytes: int

    @property
    def type(self) -> str:
        """general.type: "model" unless the file says "adapter", "imatrix", …"""
        return str(self.metadata.get("general.type", "model"))

    @property
    def architecture(self) -> str | None:
        """`general.architecture`, such as "llama"; None where the file names none."""
        value = self.metadata.get("general.architecture")
        return value if isinstance(value, str) else None

    def hyperparameter(self, name: str) -> Any | None:
        """The value of `<architecture>.<name>`, None where the file has none."""
        return self.metadata.get(f"{self.architecture}.{name}")

    @property
    def is_encoder(self) -> bool:
        """Whether it reads alone: no next token is predicted."""
        return self.hyperparameter("attention.causal") is False

    @property
    def n_parameters(self) -> int:
        """Numbers in all tensors together."""
        return sum(tensor.n_elements for tensor in self.tensors)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, padding left out."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Effective: all tensor bytes over all parameters, whatever the file's name says."""
        return 8 * self.tensor_bytes / self.n_parameters if self.n_parameters else 0.0

    @property
    def file_type(self) -> int | None:
        """general.file_type, llama.cpp's LLAMA_FTYPE number."""
        value = self.metadata.get("general.file_type")
        return value if isinstance(value, int) else None

    @property
    def n_ctx_train(self) -> int | None:
        """Tokens of context the model was trained for."""
        value = self.hyperparameter("context_length")
        return value if isinstance(value, int) else None

    @property
    def chat_template(self) -> str | None:
        """The default chat template; None for a model without one."""
        value = self.metadata.get("tokenizer.chat_template")
        return value if isinstance(value, str) else None

    @property
    def types(self) -> dict[TensorType, int]:
        """Bytes of tensor data stored in each type, largest first."""
        totals: dict[TensorType, int] = {}
        for tensor in self.tensors:
            totals[tensor.type] = totals.get(tensor.type, 0) + tensor.size_bytes
        return dict(sorted(totals.items(), key=lambda item: -item[1]))

    def require(self, kind: str) -> "Header":
        """Itself when it is a `kind` ("model" or "adapter") with an architecture and tensors."""
        if self.type != kind:
            raise InvalidGGUF(
                self.path,
                f"general.type is {self.type!r}, expected {kind!r}",
                remedy=f"give a GGUF that holds a {kind}",
            )
        if not self.architecture:
            raise InvalidGGUF(self.path, "the key general.architecture is missing")
        if not self.tensors:
            raise InvalidGGUF(self.path, "it holds no tensors", remedy="give the file with the weights")
        return self


def read_header(path: Path) -> Header:
    """Validate the header of `path` completely; raises InvalidGGUF, or OSError when unreadable."""
    path = Path(path)
    with path.open("rb") as file:
        size = path.stat().st_size
        if size < 24:
            raise InvalidGGUF(path, f"truncated: the fixed header needs 24 bytes, the file has {size}")
        with mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            return _parse(Cursor(data, path))


def _parse(cursor: Cursor) -> Header:
    version = _version(cursor)
    n_tensors = cursor.count("the tensor count", limit=MAX_TENSORS, item_bytes=0)
    n_keys = cursor.count("the key count", limit=MAX_KEYS, item_bytes=13)
    metadata = _metadata(cursor, n_keys)
    alignment = _alignment(cursor, metadata)
    infos = _tensor_infos(cursor, n_tensors)
    data_offset = _pad(cursor.position, alignment)
    return Header(
        path=cursor.path,
        version=version,
        alignment=alignment,
        metadata=metadata,
        tensors=tuple(_placed(cursor, infos, data_offset=data_offset, alignment=alignment)),
        data_offset=data_offset,
        size_bytes=cursor.end,
    )


def _version(cursor: Cursor) -> int:
    magic = cursor.data[cursor.need(4, "the magic") : 4]
    if magic != MAGIC:
        raise InvalidGGUF(
            cursor.path,
            f"it begins with {magic!r}, expected {MAGIC!r}",
            remedy="give the path of a .gguf file",
        )
    version = cursor.u32("the version")
    if version not in VERSIONS:
        swapped = version & 0xFFFF == 0 and version
        hint = " (a big-endian file)" if swapped else ""
        raise cursor.fail(f"version {version}{hint} is not supported, 2 and 3 are")
    return version


def _metadata(cursor: Cursor, n_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(n_keys):
        key = cursor.string(f"key {index} of {n_keys}", limit=MAX_KEY_BYTES)
        if not key:
            raise cursor.fail(f"key {index} of {n_keys} is empty")
        if key in metadata:
            raise cursor.fail(f"the key {key!r} occurs twice")
        metadata[key] = cursor.value(f"key {key!r}")
    return metadata


def _alignment(cursor: Cursor, metadata: Mapping[str, Any]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_ALIGNMENT:
        raise cursor.fail(f"general.alignment is {value!r}, expected a power of two up to {MAX_ALIGNMENT}")
    if value & (value - 1):
        raise cursor.fail(f"general.alignment is {value}, not a power of two")
    return value


def _tensor_infos(cursor: Cursor, n_tensors: int) -> list[TensorInfo]:
    """The table of tensors, offsets still relative to the data section."""
    if n_tensors * 32 > cursor.end - cursor.position:
        raise cursor.fail(
            f"the tensor count is {n_tensors}, which needs at least {n_tensors * 32} bytes; "
            f"{cursor.end - cursor.position} are left (file truncated or count wrong)"
        )
    infos, seen = [], set()
    for index in range(n_tensors):
        info = _tensor_info(cursor, f"tensor {index} of {n_tensors}")
        if info.name in seen:
            raise cursor.fail(f"the tensor {info.name!r} occurs twice")
        seen.add(info.name)
        infos.append(info)
    return infos


def _tensor_info(cursor: Cursor, where: str) -> TensorInfo:
    name = cursor.string(f"the name of {where}", limit=MAX_NAME_BYTES)
    what = f"tensor {name!r}"
    n_dims = cursor.u32(f"the dimensions of {what}")
    if not 1 <= n_dims <= MAX_DIMENSIONS:
        raise cursor.fail(f"{what} has {n_dims} dimensions, expected 1 to {MAX_DIMENSIONS}")
    shape = tuple(cursor.u64(f"the shape of {what}") for _ in range(n_dims))
    number = cursor.u32(f"the type of {what}")
    offset = cursor.u64(f"the offset of {what}")
    try:
        kind = TensorType(number)
    except ValueError:
        raise cursor.fail(f"{what} has type number {number}, unknown to this version") from None
    return TensorInfo(name, shape, kind, offset, _size_bytes(cursor, what, shape, kind))


def _size_bytes(cursor: Cursor, what: str, shape: tuple[int, ...], kind: TensorType) -> int:
    if 0 in shape or max(shape) > MAX_BYTES or math.prod(shape) > MAX_BYTES:
        raise cursor.fail(f"{what} has the impossible shape {list(shape)}")
    if shape[0] % kind.block_elements:
        raise cursor.fail(
            f"{what} has rows of {shape[0]}, not a multiple of {kind.name}'s block of {kind.block_elements}"
        )
    return math.prod(shape) // kind.block_elements * kind.block_bytes


def _placed(
    cursor: Cursor, infos: list[TensorInfo], *, data_offset: int, alignment: int
) -> Iterator[TensorInfo]:
    """Tensors with absolute offsets; llama.cpp wants them one after the other, each padded."""
    expected = 0
    for info in infos:
        if info.offset != expected:
            raise cursor.fail(f"tensor {info.name!r} is at offset {info.offset}, expected {expected}")
        expected += _pad(info.size_bytes, alignment)
    needed = data_offset + (infos[-1].offset + infos[-1].size_bytes if infos else 0)
    if infos and needed > cursor.end:
        raise cursor.fail(
            f"truncated: its tensors need {needed} bytes, {cursor.end} are present "
            f"({needed - cursor.end} missing)"
        )
    for info in infos:
        yield replace(info, offset=data_offset + info.offset)


def _pad(value: int, alignment: int) -> int:
    return (value + alignment - 1) // alignment * alignment
