"""Read GGUF primitives from a file that may lie: strings, arrays, typed values.

Every length is checked against the bytes that are left before anything is read or allocated.
Knows the encoding; what the keys and tensors mean is models/gguf.py's business.
"""

import struct
from collections.abc import Sequence
from mmap import mmap
from pathlib import Path
from typing import Any

from models.errors import ModelsError

MAX_STRING_BYTES = 64 << 20
MAX_ARRAY_ITEMS = 1 << 25
MAX_HEADER_BYTES = 1 << 30

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, tuple[str, str]] = {
    0: ("uint8", "B"),
    1: ("int8", "b"),
    2: ("uint16", "H"),
    3: ("int16", "h"),
    4: ("uint32", "I"),
    5: ("int32", "i"),
    6: ("float32", "f"),
    7: ("bool", "?"),
    10: ("uint64", "Q"),
    11: ("int64", "q"),
    12: ("float64", "d"),
}
_U64 = struct.Struct("<Q")
_U32 = struct.Struct("<I")


class InvalidGGUF(ModelsError):
    """A file that is not a GGUF llama.cpp could load; the message says what is wrong and where."""

    def __init__(self, path: Path, problem: str, *, remedy: str = "download or convert it again") -> None:
        super().__init__(f"{path}: not a valid GGUF file: {problem}; {remedy}")
        self.path = path
        self.problem = problem


class Cursor:
    """A position in a mapped file; each read moves it or raises InvalidGGUF."""

    def __init__(self, data: mmap | bytes, path: Path) -> None:
        self.data = data
        self.path = path
        self.end = len(data)
        self.position = 0

    def fail(self, problem: str) -> InvalidGGUF:
        return InvalidGGUF(self.path, problem)

    def need(self, count: int, what: str) -> int:
        """Reserve `count` bytes for `what`; returns where they begin."""
        start = self.position
        if count > self.end - start:
            raise self.fail(
                f"truncated or wrong count: {what} at byte {start} needs {count} bytes, "
                f"{self.end - start} of the file's {self.end} are left"
            )
        if start + count > MAX_HEADER_BYTES:
            raise self.fail(f"its header goes past {MAX_HEADER_BYTES} bytes at {what}")
        self.position = start + count
        return start

    def u32(self, what: str) -> int:
        return _U32.unpack_from(self.data, self.need(4, what))[0]

    def u64(self, what: str) -> int:
        return _U64.unpack_from(self.data, self.need(8, what))[0]

    def count(self, what: str, *, limit: int, item_bytes: int) -> int:
        """A u64 count, refused when above `limit` or when that many items cannot fit in the file."""
        count = self.u64(what)
        if count > limit:
            raise self.fail(f"{what} is {count}, above the limit of {limit}")
        if count * item_bytes > self.end - self.position:
            raise self.fail(
                f"{what} is {count}, which needs at least {count * item_bytes} bytes; "
                f"{self.end - self.position} are left (file truncated or count wrong)"
            )
        return count

    def string(self, what: str, *, limit: int = MAX_STRING_BYTES) -> str:
        """A UTF-8 string; bytes that are not UTF-8 survive as surrogate escapes."""
        size = self.u64(f"the length of {what}")
        if size > limit:
            raise self.fail(f"{what} claims {size} bytes, above the limit of {limit}")
        start = self.need(size, what)
        return self.data[start : start + size].decode("utf-8", "surrogateescape")

    def value(self, what: str) -> Any:
        """A typed value: int, float, bool, str, or a list of them."""
        kind = self.u32(f"the type of {what}")
        if kind == _ARRAY:
            return self._array(what)
        if kind == _STRING:
            return self.string(f"the value of {what}")
        return self._scalars(kind, 1, what)[0]

    def _array(self, what: str) -> Sequence[Any]:
        kind = self.u32(f"the element type of {what}")
        if kind == _ARRAY:
            raise self.fail(f"{what} is an array of arrays, which llama.cpp does not read")
        if kind == _STRING:
            return self._strings(
                self.count(f"the length of {what}", limit=MAX_ARRAY_ITEMS, item_bytes=8), what
            )
        if kind not in _SCALARS:
            raise self.fail(f"{what} has unknown element type {kind}")
        size = struct.calcsize("<" + _SCALARS[kind][1])
        count = self.count(f"the length of {what}", limit=MAX_ARRAY_ITEMS, item_bytes=size)
        return list(self._scalars(kind, count, what))

    def _scalars(self, kind: int, count: int, what: str) -> tuple[Any, ...]:
        if kind not in _SCALARS:
            raise self.fail(f"{what} has unknown type {kind}")
        name, code = _SCALARS[kind]
        size = struct.calcsize("<" + code)
        start = self.need(size * count, f"{what} ({name})")
        if kind == _BOOL and any(byte > 1 for byte in self.data[start : start + count]):
            raise self.fail(f"{what} holds a bool that is neither 0 nor 1")
        return struct.unpack_from(f"<{count}{code}", self.data, start)

    def _strings(self, count: int, what: str) -> list[str]:
        """The hot loop: a vocabulary has hundreds of thousands of these."""
        data, position, end, unpack = self.data, self.position, self.end, _U64.unpack_from
        strings: list[str] = []
        for index in range(count):
            start = position + 8
            size = unpack(data, position)[0] if start <= end else -1
            if size < 0 or size > end - start:
                raise self.fail(
                    f"truncated or wrong length: item {index} of {count} of {what} at byte {position} "
                    f"goes past the file's {end} bytes"
                )
            position = start + size
            strings.append(str(data[start:position], "utf-8", "surrogateescape"))
        self.need(position - self.position, what)
        return strings
