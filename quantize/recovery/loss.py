"""KL(source || quantized) over the vocabulary, a few positions at a time, and its gradient."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from quantize.errors import QuantizeError
from quantize.network.network import Network
from quantize.network.stream import blocks
from quantize.recovery.student import Student
from quantize.recovery.teacher import Teacher, hold_head

#: Logits computed at once, over positions and vocabulary: 64 MB of each array in float32.
LOGITS = 1 << 24


class OtherVocabulary(QuantizeError):
    """Two files that do not predict the same tokens."""

    def __init__(self, source: Path, quantized: Path, sizes: tuple[int, int]) -> None:
        super().__init__(
            f"{quantized} predicts {sizes[1]} tokens and {source} {sizes[0]}: they are not of one model; "
            "give the file that this one was made from"
        )


class UnknownTokens(QuantizeError):
    """Windows with ids that the model does not have."""

    def __init__(self, highest: int, n_vocab: int) -> None:
        super().__init__(
            f"the windows hold token {highest} and the model has {n_vocab}; cut them with its own tokenizer"
        )


def check_vocabulary(source: Network, quantized: Network, windows: np.ndarray) -> None:
    """Raise OtherVocabulary or UnknownTokens before any work."""
    sizes = tuple(network.file.shape(network.head_name)[0] for network in (source, quantized))
    if sizes[0] != sizes[1]:
        paths = source.file.header.path, quantized.file.header.path
        raise OtherVocabulary(paths[0], paths[1], (sizes[0], sizes[1]))
    if windows.min() < 0 or windows.max() >= sizes[0]:
        raise UnknownTokens(int(windows.max() if windows.min() >= 0 else windows.min()), sizes[0])


def backward(student: Student, teacher: Teacher, tokens: Tensor, chosen: np.ndarray, share: float) -> float:
    """Add `share` times the gradient of the mean divergence over some windows to the knobs'; return it.

    `tokens` (batch, tokens) are the windows that `chosen` counts. The head's part is taken back by a few
    positions at a time, so that no more of their logits is ever there.
    """
    normed = student.run(tokens)
    rows = normed.detach().flatten(0, 1).requires_grad_()
    head = student.weight(student.head_name)
    leaf = head.detach().requires_grad_(head.requires_grad)
    wanted = teacher.normed[chosen].flatten(0, 1)
    student.replaced[student.head_name] = leaf
    total = 0.0
    try:
        for part in _chunks(len(rows), len(leaf)):
            kl = _divergences(student, teacher, rows[part], wanted[part]).sum()
            (kl * (share / len(rows))).backward()
            total += float(kl.detach())
    finally:
        del student.replaced[student.head_name]
    if leaf.grad is not None:
        head.backward(leaf.grad)
    assert rows.grad is not None
    normed.backward(rows.grad.view_as(normed))
    return total / len(rows)


def divergence(student: Student, teacher: Teacher, windows: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """(windows, tokens) float64 divergences of the file as it would be stored."""
    found = []
    with student.as_stored():
        hold_head(student)
        try:
            for part in blocks(len(chosen), windows.shape[1]):
                normed = student.run(torch.from_numpy(windows[chosen[part]]).to(student.device))
                rows, wanted = normed.flatten(0, 1), teacher.normed[chosen[part]].flatten(0, 1)
                n_vocab = student.file.shape(student.head_name)[0]
                found += [
                    _divergences(student, teacher, rows[few], wanted[few]).cpu()
                    for few in _chunks(len(rows), n_vocab)
                ]
        finally:
            student.replaced.clear()
    return torch.cat(found).double().numpy().reshape(len(chosen), -1)


def _divergences(student: Student, teacher: Teacher, rows: Tensor, wanted: Tensor) -> Tensor:
    """(positions,) KL(source || quantized) in nats."""
    with torch.no_grad():
        truth = teacher.log_probabilities(wanted)
    found = student.logits_of(rows).log_softmax(-1)
    return functional.kl_div(found, truth, reduction="none", log_target=True).sum(-1)


def _chunks(n_rows: int, n_vocab: int) -> Iterator[slice]:
    step = max(1, LOGITS // n_vocab)
    for start in range(0, n_rows, step):
        yield slice(start, start + step)
