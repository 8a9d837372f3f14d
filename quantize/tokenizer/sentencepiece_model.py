"""Read a SentencePiece tokenizer.model: pieces, scores and types, straight from its protobuf bytes.

Parses the wire format alone; runs nothing, and needs neither protobuf nor sentencepiece.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from quantize.errors import QuantizeError


class InvalidSentencePiece(QuantizeError):
    """A tokenizer.model that is damaged, or of a kind that llama.cpp does not run."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}; download it again, or save tokenizer.json beside it")


class PieceType(IntEnum):
    """SentencePiece's numbers, which GGUF took over."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """One vocabulary entry; the higher its score, the earlier it is merged."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """The vocabulary in id order, and whether text gets a leading space."""

    pieces: tuple[Piece, ...]
    adds_space_prefix: bool
    normalizes: bool


BPE = 2


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Parse the file; raises InvalidSentencePiece."""
    try:
        return _parse(path, path.read_bytes())
    except (ValueError, IndexError, struct.error, UnicodeDecodeError) as error:
        raise InvalidSentencePiece(path, f"is no SentencePiece model ({error})") from None


def _parse(path: Path, data: bytes) -> SentencePieceModel:
    pieces, algorithm, prefix, charsmap = [], 1, True, b""
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_message(value)))
        elif number == 2:
            algorithm = dict(_fields(_message(value))).get(3, 1)
        elif number == 3:
            normalizer = dict(_fields(_message(value)))
            prefix, charsmap = bool(normalizer.get(3, 1)), normalizer.get(2, b"")
    if not pieces:
        raise InvalidSentencePiece(path, "holds no pieces")
    if algorithm != BPE:
        raise InvalidSentencePiece(
            path, f"is of model type {algorithm} (unigram is 1), only BPE (2) is supported"
        )
    return SentencePieceModel(tuple(pieces), prefix, bool(charsmap))


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    score = struct.unpack("<f", _message(fields[2]))[0] if 2 in fields else 0.0
    text = fields.get(1, b"")
    return Piece(_message(text).decode("utf-8"), score, PieceType(fields.get(3, 1)))


def _message(value: bytes | int) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where a message belongs")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """(field number, value): int for a varint, else the bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        length = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            length, at = _varint(data, at)
        if length is None or at + length > len(data):
            raise ValueError(f"field {key >> 3} runs past the end or has wire type {kind}")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than ten bytes")
