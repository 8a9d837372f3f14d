"""What crosses the boundary between the engine's client and its process: length-prefixed pickles.

Both ends are our own code on one socket pair that nobody else can open, so pickle is safe here. Errors travel
as class and attributes, since an exception with a constructor of its own does not unpickle.
"""

import pickle
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from engine.request import EngineConfig, EngineError, EngineInfo, EngineStats, Event, GenerationRequest

HEADER = struct.Struct("<I")
PROTOCOL = pickle.HIGHEST_PROTOCOL


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
    request: GenerationRequest


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
    """Everything that one step gave; with a snapshot when a request ended.

    A tuple, as is Delta: pickling it takes a fifth of a frozen dataclass's time, and there is one a step.
    """

    items: list[tuple[int, Event | Failure]]
    stats: EngineStats | None = None


Question = Tokenize | Detokenize | AskStats
Command = Start | Submit | Cancel | Question
Reply = Ready | Failure | Answer | Outputs


def frame(message: Command | Reply) -> bytes:
    """One message as bytes."""
    data = pickle.dumps(message, PROTOCOL)
    return HEADER.pack(len(data)) + data


def messages(buffer: bytearray) -> Iterator[Any]:
    """Take every complete message off the front of what was received."""
    while len(buffer) >= HEADER.size:
        (size,) = HEADER.unpack_from(buffer)
        end = HEADER.size + size
        if len(buffer) < end:
            return
        data = bytes(buffer[HEADER.size : end])
        del buffer[:end]
        yield pickle.loads(data)
