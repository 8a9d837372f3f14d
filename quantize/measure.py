"""Run models over held-out texts and compare what they predict.

The source's log-probabilities lie on disk while candidates are measured, one sequence in memory at a time.
Both run on the same backend, with an f16 KV cache unless its cost is what is measured. The arithmetic is
`quantize.divergence`'s.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.llama import Context, Model, evaluate
from engine.request import KVType
from models.atomic import whole
from quantize.calibration.conversation import Conversation, Role
from quantize.divergence import Divergence, TokenScores, log_softmax, score, summarise
from quantize.errors import QuantizeError

Progress = Callable[[int, int], None]  # tokens read, tokens in all


@dataclass(frozen=True, slots=True)
class Passage:
    """A token sequence and the positions whose prediction is scored, each at least 1."""

    tokens: tuple[int, ...]
    positions: tuple[int, ...]

    @property
    def targets(self) -> np.ndarray:
        return np.array([self.tokens[i] for i in self.positions])

    @property
    def rows(self) -> np.ndarray:
        """The tokens after which the positions are predicted."""
        return np.array(self.positions) - 1


@dataclass(frozen=True, slots=True)
class Backend:
    """Where models run; the same for the source and for every candidate.

    `type_k` and `type_v` are the types of cached keys and values. `unified`: one memory for all sequences,
    in which attention sums in 64 bits, so that the same is computed with other rounding.
    """

    n_threads: int | None = None
    n_gpu_layers: int | None = None
    type_k: KVType = "f16"
    type_v: KVType = "f16"
    unified: bool = False


class NoRoomForReference(QuantizeError):
    """Too little disk for the source's predictions."""

    def __init__(self, folder: Path, needed: int, free: int) -> None:
        super().__init__(
            f"the source's predictions need {needed / 1e6:.0f} MB below {folder} and {free / 1e6:.0f} MB are "
            "free; lower --eval-tokens or choose another --out"
        )


def passages(conversations: Sequence[Conversation], *roles: Role) -> list[Passage]:
    """The sequences with the tokens of some roles scored. Of a plain text only the second half is, as
    llama-perplexity does, so that every scored token has context."""
    result = []
    for conversation in conversations:
        positions = sorted(
            position
            for role in roles
            for position in conversation.positions(role)
            if position >= (len(conversation.tokens) // 2 if role == "text" else 1)
        )
        if positions:
            result.append(Passage(conversation.tokens, tuple(positions)))
    return result


def some(texts: Sequence[Passage], n_scored: int) -> list[Passage]:
    """The first of them, with about so many scored tokens."""
    taken, count = [], 0
    for text in texts:
        if count >= n_scored:
            break
        taken.append(text)
        count += len(text.positions)
    return taken


def write_reference(
    source: Path, texts: Sequence[Passage], out: Path, *, backend: Backend, progress: Progress | None = None
) -> None:
    """Store the source's log-probabilities at every scored position, float32, at `out`."""
    n_rows = sum(len(text.positions) for text in texts)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _opened(source, texts, backend) as context:
        needed = 4 * n_rows * context.model.n_vocab
        free = shutil.disk_usage(out.parent).free
        if needed > free:
            raise NoRoomForReference(out.parent, needed, free)
        with whole(out) as partial, partial.open("wb") as file:
            for _, logits in _logits(context, texts, progress):
                file.write(log_softmax(logits).tobytes())


def measure(
    candidate: Path,
    texts: Sequence[Passage],
    reference: Path,
    *,
    backend: Backend,
    progress: Progress | None = None,
) -> Divergence:
    """Compare a candidate with the stored reference over the same texts."""
    return summarise(token_scores(candidate, texts, reference, backend=backend, progress=progress))


def token_scores(
    candidate: Path,
    texts: Sequence[Passage],
    reference: Path,
    *,
    backend: Backend,
    progress: Progress | None = None,
) -> list[TokenScores]:
    """The same token by token, a record a text, for comparing candidates with each other."""
    return scores_against(candidate, texts, [reference], backend=backend, progress=progress)[0]


def scores_against(
    candidate: Path,
    texts: Sequence[Passage],
    references: Sequence[Path],
    *,
    backend: Backend,
    progress: Progress | None = None,
) -> list[list[TokenScores]]:
    """Compare a candidate with several stored references, reading the texts once; by reference, by text.

    A reference may go on after the last of the texts.
    """
    scores: list[list[TokenScores]] = [[] for _ in references]
    start = 0
    with _opened(candidate, texts, backend) as context:
        n_vocab = context.model.n_vocab
        stored = [np.memmap(path, np.float32, "r").reshape(-1, n_vocab) for path in references]
        for text, logits in _logits(context, texts, progress):
            end = start + len(text.positions)
            for one, found in zip(stored, scores, strict=True):
                found.append(score(one[start:end], logits, text.targets))
            start = end
    return scores


def scores_between(reference: Path, candidate: Path, texts: Sequence[Passage]) -> list[TokenScores]:
    """Compare two stored predictions, text by text; the candidate's are of just these texts."""
    n_rows = sum(len(text.positions) for text in texts)
    other = np.memmap(candidate, np.float32, "r").reshape(n_rows, -1)
    stored = np.memmap(reference, np.float32, "r").reshape(-1, other.shape[1])
    found, start = [], 0
    for text in texts:
        end = start + len(text.positions)
        found.append(score(stored[start:end], other[start:end], text.targets))
        start = end
    return found


@contextmanager
def _opened(path: Path, texts: Sequence[Passage], backend: Backend) -> Iterator[Context]:
    longest = max(len(text.tokens) for text in texts)
    with (
        Model.open(path, n_gpu_layers=backend.n_gpu_layers) as model,
        Context.open(
            model, n_ctx=longest, n_batch=min(longest, 512), n_threads=backend.n_threads,
            type_k=backend.type_k, type_v=backend.type_v, unified=backend.unified,
        ) as context,
    ):  # fmt: skip
        yield context


def _logits(
    context: Context, texts: Sequence[Passage], progress: Progress | None
) -> Iterator[tuple[Passage, np.ndarray]]:
    """Each passage with the (positions, n_vocab) logits that predict its scored positions."""
    total, done = sum(len(text.tokens) for text in texts), 0
    for text in texts:
        yield text, evaluate(context, text.tokens, outputs=text.rows)
        done += len(text.tokens)
        if progress:
            progress(done, total)
