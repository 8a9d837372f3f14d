"""Round a changed model and measure how far it is from the source; each trial is kept when it is done.

Owns the files of a trial. Which changes are tried, and which one is used, is `quantize.transforms.explore`'s.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from models.atomic import whole
from quantize.calibration.imatrix import ImportanceMatrix
from quantize.divergence import Estimate, clustered
from quantize.gguf_files.mixed_file import Encode, MixedSource, Parts, write_mixed
from quantize.gguf_files.tensor_rules import fitting_types
from quantize.gguf_files.types import dequantize_rows, quantize_rows
from quantize.measure import Backend, Passage, token_scores, write_reference
from quantize.mixes.candidates import Candidates
from quantize.mixes.encoding import Best, Losses, Nearest
from quantize.network.network import lookups
from quantize.transforms.biases import correct, may_have_bias
from quantize.transforms.exact import NotExact, check_exact
from quantize.transforms.folded import Fold, Folded
from quantize.transforms.scaling import Round, loss, sampled

Rounding = Literal["nearest", "best"]
Progress = Callable[[str, int, int | None], None]
#: What takes the place of a type that a row does not fit, and of one whose rows were padded to fit 256.
NARROW = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
WIDE = {"Q4_0": "Q4_K", "IQ4_NL": "Q4_K", "Q4_1": "Q4_K", "Q5_0": "Q5_K", "Q5_1": "Q5_K", "Q8_0": "Q6_K"}
PREDICTED_ROWS = 64  # of each matrix


def nearest(kind: str) -> Round:
    """ggml's rounding to nearest, weighed by the diagonal of the Hessian."""

    def rounded(weights: np.ndarray, hessian: np.ndarray) -> np.ndarray:
        fitting = fitting_type(kind, weights.shape[1])
        importance = np.diagonal(hessian).astype(np.float32)
        return dequantize_rows(fitting, quantize_rows(fitting, weights, importance), weights.shape[1])

    return rounded


def fitting_type(kind: str, width: int) -> str:
    """The type itself, or what stands in for it in rows that its blocks do not fill."""
    while not fitting_types(width, [kind]):
        kind = NARROW.get(kind, "F16")
    return kind


@dataclass(frozen=True, slots=True)
class Ground:
    """What all trials share. `types`: tensor -> type, of a mix, or one type for all; `key`: what source,
    texts and importance come down to, for finding trials again; `folder` holds files meanwhile."""

    source: Path
    matrix: ImportanceMatrix
    types: Mapping[str, str] | str
    passages: Sequence[Passage]
    folder: Path
    key: str
    backend: Backend
    progress: Progress


@dataclass(frozen=True, slots=True)
class Outcome:
    """A trial that was measured: KL of each scored token by text, file size, seconds that it took."""

    kl: tuple[np.ndarray, ...]
    size_bytes: int
    largest_kl: float
    seconds: float

    @property
    def mean(self) -> Estimate:
        """Mean divergence, its error clustered by text."""
        return clustered(self.kl)

    def gain(self, other: "Outcome") -> Estimate:
        """How much lower this one's divergence is than another's on the same tokens, paired."""
        return clustered([theirs - ours for ours, theirs in zip(self.kl, other.kl, strict=True)])


class Trials:
    """The trials of one source."""

    def __init__(self, ground: Ground) -> None:
        self.ground = ground
        ground.folder.mkdir(parents=True, exist_ok=True)

    def run(
        self,
        model: Folded,
        *,
        rounding: Rounding = "nearest",
        kind: str | None = None,
    ) -> Outcome:
        """Measure a model under its changes; raises NotExact. `kind`: another type for all tensors."""
        types = self.ground.types if kind is None else kind
        path = self._path(model, rounding, types)
        if (found := _read(path)) is not None:
            return found
        started, changed, largest = time.monotonic(), self.ground.source, 0.0
        if model.folds:
            changed = self.ground.folder / "changed.gguf"
            model.write(changed)
            name, tokens = model.folds[-1].name, max((p.tokens for p in self.ground.passages), key=len)
            try:
                largest = check_exact(name, self.ground.source, changed, tokens)
            except NotExact:
                changed.unlink()  # or the next one would lie beside it while it is written
                raise
        self._round(model, changed, rounding, types)
        if model.corrects:
            correct(changed, self._file, model.mean)
        if changed != self.ground.source:
            changed.unlink()
        scores, size = self._measure()
        outcome = Outcome(scores, size, largest, time.monotonic() - started)
        _write(path, outcome)
        return outcome

    def predict(self, model: Folded) -> float:
        """The last change's mean ratio of trace(D H D^T), over all matrices, on some of their rows."""
        before = Folded(model.source, model.hessians, model.folds[:-1])
        ratios = [self._ratio(before, model.folds[-1], name) for name in self._products(model)]
        return float(np.mean(ratios))

    def _ratio(self, before: Folded, fold: Fold, name: str) -> float:
        corrected = fold.corrects and may_have_bias(before.header, name)
        if name not in fold.columns and not corrected:
            return 1.0
        weights, hessian = sampled(before.array(name), PREDICTED_ROWS), before.read(name)
        plain = loss(weights, hessian, self.rounded(name))
        if corrected:
            mean = before.mean(name)
            changed = loss(weights, hessian, self.rounded(name), weighed=hessian - np.outer(mean, mean))
        else:
            after = before.then(fold)
            weights = sampled(after.array(name), PREDICTED_ROWS)
            changed = loss(weights, after.read(name), self.rounded(name))
        return changed / plain if plain else 1.0

    def _products(self, model: Folded) -> list[str]:
        names = [tensor.name for tensor in model.source.quantizable]
        return [name for name in names if name not in lookups(model.tensors)]

    def rounded(self, name: str | None = None) -> Round:
        """How a tensor is rounded to compare changes with; without a name, how most are."""
        types = self.ground.types
        if isinstance(types, str):
            return nearest(types)
        kinds = list(types.values())
        return nearest(types.get(name or "", max(set(kinds), key=kinds.count)))

    @cached_property
    def reference(self) -> Path:
        """The unchanged source's predictions, made when they are first asked for."""
        path = self.ground.folder / f"reference-{self.ground.key[:16]}.f32"
        if not path.exists():
            self.ground.progress("predicting with the source", 0, None)
            write_reference(self.ground.source, self.ground.passages, path, backend=self.ground.backend)
        return path

    def clear(self) -> None:
        """Remove the large files; finished trials stay."""
        self._parts.prune()
        for path in self.ground.folder.glob("*.f32"):
            path.unlink()

    @property
    def _file(self) -> Path:
        return self.ground.folder / "try.gguf"

    def _round(
        self, model: Folded, changed: Path, rounding: Rounding, types: Mapping[str, str] | str
    ) -> None:
        source = MixedSource.open(changed)
        write_mixed(
            source, self._file, self._types(source, types), self._encode(model, rounding),
            parts=self._parts, whole_matrices=rounding == "best",
            made_from=lambda name, _: repr((rounding, self.ground.key, model.touched(name))),
        )  # fmt: skip

    def _measure(self) -> tuple[tuple[np.ndarray, ...], int]:
        reference, size = self.reference, self._file.stat().st_size
        scores = token_scores(self._file, self.ground.passages, reference, backend=self.ground.backend)
        self._file.unlink()
        return tuple(score.kl for score in scores), size

    def _types(self, source: MixedSource, types: Mapping[str, str] | str) -> dict[str, str]:
        found = {}
        for tensor in source.quantizable:
            wanted = types if isinstance(types, str) else types.get(tensor.name)
            if wanted is not None:
                found[tensor.name] = fitting_type(wanted, tensor.shape[0])
        return found

    def _encode(self, model: Folded, rounding: Rounding) -> Encode:
        candidates = Candidates(model.importance(self.ground.matrix).means())
        if rounding == "nearest":
            return Nearest(candidates)
        return Best(candidates, model, Losses(self._parts.folder), lookups(model.tensors))

    @property
    def _parts(self) -> Parts:
        folder = self.ground.folder / "parts"
        folder.mkdir(exist_ok=True)
        return Parts(folder)

    def _path(self, model: Folded, rounding: Rounding, types: Mapping[str, str] | str) -> Path:
        identity = [self.ground.key, [fold.name for fold in model.folds], rounding, types]
        text = json.dumps(identity, sort_keys=True, default=dict)
        return self.ground.folder / f"trial-{hashlib.sha256(text.encode()).hexdigest()[:24]}.npz"


def _write(path: Path, outcome: Outcome) -> None:
    lengths = [len(part) for part in outcome.kl]
    facts = [outcome.size_bytes, outcome.largest_kl, outcome.seconds]
    with whole(path) as partial, partial.open("wb") as file:
        np.savez(file, kl=np.concatenate(outcome.kl), lengths=lengths, facts=np.array(facts, np.float64))


def _read(path: Path) -> Outcome | None:
    if not path.exists():
        return None
    with np.load(path) as file:
        kl = np.split(file["kl"], np.cumsum(file["lengths"])[:-1])
        size, largest, seconds = file["facts"]
    return Outcome(tuple(kl), int(size), float(largest), float(seconds))
