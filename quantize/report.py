"""Everything a run found out, as one record, and its JSON.

Owns the record and how it is read from facts; the card, the table and the plots show it.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantize.divergence import Divergence, Estimate
from quantize.gguf_files.typemap import TypeMap, TypeShare
from quantize.recovery.recovered import Recovered
from quantize.samples import Answer
from quantize.speed import Speed

if TYPE_CHECKING:
    from quantize.structure.report import StructureReport


@dataclass(frozen=True, slots=True)
class RecoveryReport:
    """What training a rounded file did. `kept`: whether the file is the trained one.

    `judged`: divergence before and after on text held back from training, which that was decided by; none
    where training helped nowhere. `chats_before`, `text_before`: of the rounded file, on the same texts as
    the file's own figures.
    """

    kept: bool
    chats_before: Divergence | None
    text_before: Divergence | None
    judged: tuple[Estimate, ...]
    trained: Recovered


@dataclass(frozen=True, slots=True)
class FileReport:
    """One GGUF: what it is, how far it diverges, how fast it runs."""

    type: str
    file: str
    sha256: str
    types: TypeMap
    speed: Speed
    chats: Divergence | None
    text: Divergence | None
    warning: str | None
    mix: "MixReport | None" = None
    answers: tuple[Answer, ...] = ()
    recovery: RecoveryReport | None = None

    @property
    def divergence(self) -> Divergence | None:
        """On the model's own chats, else on the text."""
        return self.chats or self.text


@dataclass(frozen=True, slots=True)
class Tried:
    """A mix that was measured on calibration text: mean KLD predicted and found."""

    predicted: float
    measured: float
    size_bytes: int


@dataclass(frozen=True, slots=True)
class MixReport:
    """How the types of a file within a budget were chosen. `tried[0]` is what the prediction liked best.

    `tensors`: the type of each. `rounding_loss`: the mean square that rounding adds to what layers give,
    against round-to-nearest with importance, geometric mean over tensors; None where ggml alone can round.
    `compared`: mean KLD on calibration text that was held back, of the file with every tensor rounded on its
    own and, where there was other text to do it by, of that with layers rounded in their order. Files differ
    in it, and `tried` do, as they do in the middle half of that text's pieces.
    """

    objective: str
    tensors: Mapping[str, str]
    tried: tuple[Tried, ...]
    chosen: int
    rounding_loss: float | None
    compared: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class TransformTrial:
    """One try of changes that leave a model's function as it is, rounded and measured.

    `compared`: what the gain is over; figures are None where it was `refused`. `type`: another than the one
    asked for. `predicted`: mean divergence if that went with trace(D H D^T). `gain`: how many nats lower the
    divergence is than what it is compared with, paired by token. `largest_kl`: before any rounding.
    """

    name: str
    rounding: str
    compared: str | None = None
    refused: str | None = None
    type: str | None = None
    predicted: float | None = None
    kl: Estimate | None = None
    gain: Estimate | None = None
    size_bytes: int | None = None
    largest_kl: float | None = None
    seconds: float = 0.0
    used: bool = False


@dataclass(frozen=True, slots=True)
class TextReport:
    """A set of texts: how it came about and what was dropped on the way."""

    origin: str
    n_sequences: int
    n_tokens: int
    n_scored: int
    dropped: Mapping[str, int]
    sha256: str


@dataclass(frozen=True, slots=True)
class SourceReport:
    """The model that everything is measured against."""

    name: str
    given: str
    format: str
    sha256: str
    adapter: str | None
    types: TypeMap
    speed: Speed
    architecture: str
    licence: str | None
    base_model: str | None
    answers: tuple[Answer, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """One run of `lq quantize`."""

    source: SourceReport
    files: tuple[FileReport, ...]
    calibration: TextReport | None
    evaluation: TextReport | None
    text: TextReport | None
    importance_sha256: str | None
    command: str
    seed: int
    machine: str
    n_threads: int
    versions: Mapping[str, str]
    seconds: Mapping[str, float]
    warnings: tuple[str, ...]
    transforms: tuple[TransformTrial, ...] = ()
    structure: "StructureReport | None" = None


def recommended(files: Sequence[FileReport]) -> FileReport:
    """The smallest file that is still close to the source (mean KLD under 0.1), else the closest."""
    measured = [(file.divergence.kl.mean, file) for file in files if file.divergence]
    close = [file for mean, file in measured if mean < 0.1]
    if close:
        return min(close, key=lambda file: file.types.size_bytes)
    return min(measured, key=lambda pair: pair[0])[1] if measured else files[0]


def to_json(report: Report) -> str:
    """The record as indented JSON; figures that were not measured are null."""
    return json.dumps(dataclasses.asdict(report), indent=1, ensure_ascii=False) + "\n"


def divergence_of(facts: Mapping[str, Any] | None) -> Divergence | None:
    """A divergence from what a step recorded."""
    if not facts:
        return None
    estimates = {name: Estimate(**facts[name]) for name in ("kl", "same_top", "perplexity_ratio")}
    return Divergence(**{**facts, **estimates})


def answers_of(facts: Mapping[str, Any] | None) -> tuple[Answer, ...]:
    """Answers from what a step recorded."""
    found = facts["answers"] if facts else ()
    return tuple(Answer(**{**answer, "tokens": tuple(answer["tokens"])}) for answer in found)


def types_of(facts: Mapping[str, Any]) -> TypeMap:
    """A type map from what a step recorded."""
    return TypeMap(**{**facts, "shares": tuple(TypeShare(**share) for share in facts["shares"])})


def trials_of(facts: Mapping[str, Any]) -> tuple[TransformTrial, ...]:
    """The trials of transforms from what a step recorded."""
    return tuple(_trial(row) for row in facts["trials"])


def _trial(row: Mapping[str, Any]) -> TransformTrial:
    figures = {name: Estimate(**row[name]) for name in ("kl", "gain") if row[name]}
    return TransformTrial(**{**row, **figures})
