"""Run one llama.cpp quantize call in a child process, and bring back a whole file or nothing.

Owns the child's life and its messages. llama.cpp aborts the process on
some inputs and cannot be interrupted; neither may touch us. Knows nothing of calibration.
"""

import multiprocessing
import os
import re
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

from models.atomic import whole
from quantize.calibration.imatrix import ImportanceMatrix
from quantize.disk import DiskFull
from quantize.errors import QuantizeError
from quantize.gguf_files.types import Order, call
from quantize.processes import deaf, end_with_the_parent

#: (tensor number, tensors in all, tensor name)
TensorProgress = Callable[[int, int, str], None]

TENSOR_LINE = re.compile(r"\[ *(\d+)/ *(\d+)\] +(\S+) ")
FALLBACK_LINE = re.compile(
    r"warning: (\S+) +- ncols +(\d+) not divisible by +(\d+) \(required for type +(\S+)\) "
    r"(.*)-> falling back to +(\S+)"
)
WRITE_ERRORS = ("iostream error", "basic_ios", "No space left", "File too large")


class QuantizeCallFailed(QuantizeError):
    """llama.cpp refused the file, or died on it."""


@dataclass(frozen=True, slots=True)
class Fallback:
    """A tensor whose rows do not fit its recipe's block, and the type it got instead."""

    tensor: str
    row_length: int
    wanted: str
    given: str


def quantize(order: Order, *, progress: TensorProgress | None = None) -> tuple[Fallback, ...]:
    """Make `order.out`; it appears whole or not at all. Ctrl-C stops the child and removes what it wrote.

    Returns the tensors that did not get the type they were to have.
    """
    if order.out.resolve() == order.source.resolve():
        raise QuantizeError(f"{order.out} is the source itself; choose another --out")
    with whole(order.out) as partial:
        lines = _run(replace(order, out=partial), order.out, progress)
    found = [match for line in lines if (match := FALLBACK_LINE.search(line))]
    return tuple(Fallback(m[1], int(m[2]), m[4].upper(), m[6].upper()) for m in found)


def _run(order: Order, final: Path, progress: TensorProgress | None) -> list[str]:
    """The child's log lines; raises when it failed, died or could not write."""
    with tempfile.TemporaryDirectory(prefix="lq-") as folder:
        last_words = Path(folder) / "stderr"
        succeeded, exitcode, lines = _relay(order, last_words, progress)
        if not succeeded and last_words.exists():
            lines += last_words.read_text("utf-8", "replace").splitlines()
    if not succeeded:
        raise _failure(order, final, lines, exitcode)
    return lines


def _relay(
    order: Order, last_words: Path, progress: TensorProgress | None
) -> tuple[bool, int | None, list[str]]:
    """Whether it succeeded, exit code, log lines; the child is dead when this returns or raises."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_child, args=(order, sender, last_words), name="lq-quantize", daemon=True)
    with deaf():
        process.start()
    sender.close()
    lines: list[str] = []
    try:
        while not isinstance(message := _receive(receiver), bool):
            lines.append(message)
            _tell(message, progress)
        process.join()
    finally:
        if process.is_alive():
            process.kill()
            process.join()
        receiver.close()
    return message, process.exitcode, lines


def _receive(receiver: Connection) -> str | bool:
    """The next line; True or False at the end, False also when the child died."""
    try:
        return receiver.recv()
    except EOFError:
        return False


def _tell(line: str, progress: TensorProgress | None) -> None:
    if progress and (match := TENSOR_LINE.match(line)):
        progress(int(match[1]), int(match[2]), match[3])


def _failure(order: Order, final: Path, lines: list[str], exitcode: int | None) -> QuantizeError:
    said = " ".join(lines[-12:])
    if any(sign in said for sign in WRITE_ERRORS):
        return DiskFull(final, "the disk is full or the file grew over its limit")
    reasons = [line for line in lines if "failed to quantize" in line or "GGML_ASSERT" in line]
    reason = reasons[-1].partition("failed to quantize: ")[2] or reasons[-1] if reasons else said[-300:]
    if "data validation failed" in reason:
        reason = (
            f"a weight, or the scale of a block, is beyond the float16 numbers of {order.type}, or is NaN; "
            "leave the type out, BF16 and F32 hold whatever the source does"
        )
    died = f"llama.cpp died (exit code {exitcode}): " if exitcode else ""
    return QuantizeCallFailed(f"quantizing {order.source} to {order.type} failed: {died}{reason.strip()}")


def _child(order: Order, sender: Connection, last_words: Path) -> None:
    """The child's whole life: Ctrl-C is the parent's to handle; a dead parent ends it at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_the_parent()
    os.environ["GGML_NO_BACKTRACE"] = "1"
    with last_words.open("wb") as file:
        os.dup2(file.fileno(), 2)
    relay = _LineRelay(sender)
    matrix = ImportanceMatrix.read(order.importance).means() if order.importance else {}
    succeeded = call(order, matrix, relay)
    relay.flush()
    sender.send(succeeded)
    sender.close()


class _LineRelay:
    """Joins the pieces that llama.cpp logs into lines and sends each whole one."""

    def __init__(self, sender: Connection) -> None:
        self.sender = sender
        self.pending = ""

    def __call__(self, _level: int, text: bytes) -> None:
        *lines, self.pending = (self.pending + text.decode("utf-8", "replace")).split("\n")
        try:
            for line in filter(None, lines):
                self.sender.send(line)
        except OSError:
            os._exit(1)

    def flush(self) -> None:
        if self.pending:
            self.sender.send(self.pending)
