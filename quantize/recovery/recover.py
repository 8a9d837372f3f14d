"""Recover a quantized file: train its norms and block scales until it predicts what its source predicts.

The file keeps its metadata, its types, its size and all of its codes; where training does not help on text
that was held back, it keeps every byte.
"""

from pathlib import Path

import numpy as np
import torch

from quantize.errors import QuantizeError
from quantize.network.network import Network
from quantize.network.stream import digest_of
from quantize.recovery.loss import check_vocabulary
from quantize.recovery.memory import is_lean
from quantize.recovery.recovered import Recovered
from quantize.recovery.student import Student
from quantize.recovery.teacher import Teacher
from quantize.recovery.training import Progress, Settings, TooFewWindows, Training, parameters

#: Changes when the same inputs come to other bytes.
VERSION = 3


class UnusableWindows(QuantizeError):
    """Windows that are no rows of token ids."""

    def __init__(self, windows: np.ndarray) -> None:
        super().__init__(
            f"recovery reads (windows, tokens) int64 ids, at least 2 tokens each, not {windows.shape} "
            f"{windows.dtype}; cut the texts with quantize.network.stream.cut"
        )


def silent(_what: str, _done: int, _total: int) -> None:
    """No progress."""


def recover(
    source: Path,
    quantized: Path,
    windows: np.ndarray,
    out: Path,
    *,
    settings: Settings | None = None,
    progress: Progress = silent,
    folder: Path,
    device: str | None = None,
) -> Recovered:
    """Train `quantized` towards `source` on (windows, tokens) ids and write it to `out`, whole or not at all.

    `out` has the bytes of `quantized` where no check was better than the start. `folder` keeps the state that
    a stopped run goes on from, also when what the caller does with `out` is what was stopped, and what the
    source predicts, for the next file of the same texts.
    `device`: a GPU where there is one. Raises QuantizeError.
    """
    settings = settings or Settings()
    settings.check()
    _check(windows)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    truth = Network.open(source, device=device)
    lean = is_lean(truth, quantized, windows, device)
    student = Student(quantized, device=device, lean=lean)
    check_vocabulary(truth, student, windows)
    folder.mkdir(parents=True, exist_ok=True)
    texts = digest_of(windows, *_stamps(source))
    key = digest_of(VERSION, texts, parameters(settings), *_stamps(quantized))
    teacher = Teacher.of(truth, windows, folder / "teacher.safetensors", texts, progress)
    state_file = folder / "training.pt"
    training = Training(student, teacher, windows, settings, state_file, key, progress)
    state = training.run()
    student.write(out)
    kinds = [(knob.kind, knob.offset.numel()) for knob in student.knobs.values()]
    return Recovered(
        before=state.start_kl,
        after=state.best_kl,
        n_steps=state.step,
        best_step=state.best_step,
        n_trained=training.n_trained * windows.shape[1],
        n_checked=(len(windows) - training.n_trained) * windows.shape[1],
        n_norms=sum(count for kind, count in kinds if kind == "norms"),
        n_scales=sum(count for kind, count in kinds if kind == "scales"),
        history=tuple(state.history),
    )


def _check(windows: np.ndarray) -> None:
    if windows.ndim != 2 or windows.dtype != np.int64 or windows.shape[1] < 2:
        raise UnusableWindows(windows)
    if len(windows) < 2:
        raise TooFewWindows(len(windows))


def _stamps(path: Path) -> tuple[str, int, int]:
    """What changes when a file does, without reading it."""
    found = path.stat()
    return str(path.absolute()), found.st_size, found.st_mtime_ns
