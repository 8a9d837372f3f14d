"""What crosses the boundary between the engine's client and its process: length-prefixed messages.

Pickles, but for the one message of nearly every step, text that was written, which msgpack does in a tenth
of the time. Both ends are our own code on one socket pair that nobody else can open, so pickle is safe here.
Errors travel as class and attributes, since an exception with a constructor of its own does not unpickle.
"""

import pickle
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from engine.request import (
    Delta,
    EngineConfig,
    EngineError,
    EngineInfo,
    Event,
    GenerationRequest,
    Pooled,
    PooledRequest,
    Read,
)
from engine.stats import EngineStats

HEADER = struct.Struct("<I?")  # bytes that follow; whether they are a pickle
PROTOCOL = pickle.HIGHEST_PROTOCOL
_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(list[tuple[int, Delta]]).decode


@dataclass(frozen=True, slots=True)
class Failure:
    """An EngineError on its way, as its nearest class in request.py: others would bring llama.cpp along."""

    kind: type[EngineError]
    message: str
    attributes: dict[str, Any]

    @classmethod
    def of(cls, error: EngineError) -> "Failure":
        kind = next(each for each in type(error).__mro__ if each.__module__ == EngineError.__module__)
        return cls(kind, str(error), dict(vars(error)))

    def error(self) -> EngineError:
        """The error as it was raised, without its traceback."""
        error = self.kind.__new__(self.kind, self.message)
        error.args = (self.message,)
        error.__dict__.update(self.attributes)
        return error


# To the process.
@dataclass(frozen=True, slots=True)
class Start:
    config: EngineConfig


@dataclass(frozen=True, slots=True)
class Submit:
    id: int
    request: GenerationRequest | PooledRequest


@dataclass(frozen=True, slots=True)
class Cancel:
    id: int


@dataclass(frozen=True, slots=True)
class Tokenize:
    id: int
    text: str
    add_special: bool
    parse_special: bool


@dataclass(frozen=True, slots=True)
class Detokenize:
    id: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AskStats:
    id: int


# From the process.
@dataclass(frozen=True, slots=True)
class Ready:
    info: EngineInfo


@dataclass(frozen=True, slots=True)
class Answer:
    """Of Tokenize, Detokenize, AskStats."""

    id: int
    value: list[int] | str | EngineStats | Failure


class Outputs(NamedTuple):
    """What one step gave, or several; with a snapshot when a request ended."""

    items: Sequence[tuple[int, Event | Read | Pooled | Failure]]
    stats: EngineStats | None = None

    @property
    def is_text(self) -> bool:
        """Whether there is nothing else in it, as in nearly every step."""
        return self.stats is None and all(type(event) is Delta for _, event in self.items)


Question = Tokenize | Detokenize | AskStats
Asked = Submit | Cancel | Question
Command = Start | Asked
Reply = Ready | Failure | Answer | Outputs


def frame(message: Command | Reply) -> bytes:
    """One message as bytes."""
    if isinstance(message, Outputs) and message.is_text:
        data = _pack(message.items)
        return HEADER.pack(len(data), False) + data
    data = pickle.dumps(message, PROTOCOL)
    return HEADER.pack(len(data), True) + data


def messages(buffer: bytearray) -> Iterator[Any]:
    """Take every complete message off the front of what was received."""
    while len(buffer) >= HEADER.size:
        size, is_pickle = HEADER.unpack_from(buffer)
        end = HEADER.size + size
        if len(buffer) < end:
            return
        data = bytes(buffer[HEADER.size : end])
        del buffer[:end]
        yield pickle.loads(data) if is_pickle else Outputs(_unpack(data))
