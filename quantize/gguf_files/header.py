"""The bytes before the tensors of a GGUF that is made from another one, and so how large the file will be.

Metadata is carried over byte by byte, never decoded and written anew, so nothing is lost or rounded. Knows
the format; which types the tensors get is decided elsewhere.
"""

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path

from models.gguf import read_header
from models.gguf_reader import Cursor
from models.tensor_types import TensorType
from quantize.errors import QuantizeError

MAGIC, VERSION = b"GGUF", 3
_U32, _F32, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9  # numbers of GGUF's value types
#: Bytes of an item, by its type; texts and arrays have none.
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_BEFORE_KEYS = 24  # magic, version, number of tensors, number of keys


@dataclass(frozen=True, slots=True)
class Metadata:
    """Key-value pairs in order: key -> all of the pair's bytes, the key's included."""

    pairs: Mapping[str, bytes]

    @classmethod
    def read(cls, path: Path) -> "Metadata":
        """Those of a GGUF; raises InvalidGGUF for a file that is none."""
        keys = len(read_header(path).metadata)
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            cursor = Cursor(data, path)
            cursor.need(_BEFORE_KEYS, "the fixed header")
            pairs = {}
            for index in range(keys):
                start = cursor.position
                key = cursor.string(f"key {index}")
                cursor.value(f"key {key!r}")
                pairs[key] = data[start : cursor.position]
        return cls(pairs)

    def updated(self, values: Mapping[str, int | float | str]) -> "Metadata":
        """With these in place of older ones or at the end: texts, float32, unsigned numbers of 32 bits."""
        return Metadata({**self.pairs, **{key: _pair(key, value) for key, value in values.items()}})

    def without(self, keys: Iterable[str]) -> "Metadata":
        """Less some keys, which need not be there."""
        left_out = set(keys)
        return Metadata({key: pair for key, pair in self.pairs.items() if key not in left_out})

    def with_items(self, key: str, places: Sequence[int]) -> "Metadata":
        """With only these items of an array of numbers, in this order, as they are stored."""
        start = len(_string(key))
        kind, of, _ = struct.unpack_from("<IIQ", self.pairs[key], start)
        if kind != _ARRAY or of not in _WIDTHS:
            raise QuantizeError(f"{key} is no array of numbers; take another key")
        width, items = _WIDTHS[of], self.pairs[key][start + 16 :]
        kept = b"".join(items[place * width : (place + 1) * width] for place in places)
        pair = _string(key) + struct.pack("<IIQ", _ARRAY, of, len(places)) + kept
        return Metadata({**self.pairs, key: pair})

    def with_flags(self, key: str, flags: Sequence[bool]) -> "Metadata":
        """With an array of true and false in place of what the key had."""
        pair = _string(key) + struct.pack("<IIQ", _ARRAY, _BOOL, len(flags)) + bytes(flags)
        return Metadata({**self.pairs, key: pair})


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the file to be: `shape` in ggml's order, the row length first."""

    name: str
    shape: tuple[int, ...]
    type: TensorType

    @property
    def size_bytes(self) -> int:
        """Bytes of the numbers, without the padding after them."""
        return stored_bytes(self.shape, self.type)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies: `header` is all before the tensors, padding included; offsets from the start."""

    header: bytes
    entries: tuple[Entry, ...]
    offsets: tuple[int, ...]
    size_bytes: int


def lay_out(metadata: Metadata, entries: Sequence[Entry], alignment: int) -> Layout:
    """The whole file but its numbers; every tensor is padded, the last one too, as llama.cpp does."""
    table, offset, offsets = bytearray(), 0, []
    for entry in entries:
        table += _string(entry.name) + struct.pack("<I", len(entry.shape))
        table += struct.pack(f"<{len(entry.shape)}Q", *entry.shape)
        table += struct.pack("<IQ", int(entry.type), offset)
        offsets.append(offset)
        offset += padded(entry.size_bytes, alignment)
    fixed = MAGIC + struct.pack("<IQQ", VERSION, len(entries), len(metadata.pairs))
    header = fixed + b"".join(metadata.pairs.values()) + bytes(table)
    header += bytes(-len(header) % alignment)
    places = tuple(len(header) + each for each in offsets)
    return Layout(header, tuple(entries), places, len(header) + offset)


def stored_bytes(shape: Sequence[int], kind: TensorType) -> int:
    """Bytes of a tensor in a type whose blocks fill its rows."""
    elements = 1
    for length in shape:
        elements *= length
    return elements // kind.block_elements * kind.block_bytes


def padded(size_bytes: int, alignment: int) -> int:
    """Up to the next multiple."""
    return -(-size_bytes // alignment) * alignment


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _pair(key: str, value: int | float | str) -> bytes:
    if isinstance(value, str):
        return _string(key) + struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, float):
        return _string(key) + struct.pack("<If", _F32, value)
    return _string(key) + struct.pack("<II", _U32, value)
