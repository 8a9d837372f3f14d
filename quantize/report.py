"""Everything a run found out, as one record, and its JSON.

Owns the record and how it is read from facts; the card, the table and the plots show it.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantize.divergence import Divergence, Estimate
from quantize.speed import Speed
from quantize.typemap import TypeMap, TypeShare


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

    @property
    def divergence(self) -> Divergence | None:
        """On the model's own chats, else on the text."""
        return self.chats or self.text


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


def to_json(report: Report) -> str:
    """The record as indented JSON; figures that were not measured are null."""
    return json.dumps(dataclasses.asdict(report), indent=1, ensure_ascii=False) + "\n"


def divergence_of(facts: Mapping[str, Any] | None) -> Divergence | None:
    """A divergence from what a step recorded."""
    if not facts:
        return None
    estimates = {name: Estimate(**facts[name]) for name in ("kl", "same_top", "perplexity_ratio")}
    return Divergence(**{**facts, **estimates})


def types_of(facts: Mapping[str, Any]) -> TypeMap:
    """A type map from what a step recorded."""
    return TypeMap(**{**facts, "shares": tuple(TypeShare(**share) for share in facts["shares"])})
