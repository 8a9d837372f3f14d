"""Try every change that leaves a model's function as it is, and keep what lowers its divergence once rounded.

Each is tried alone, those that help on top of each other, and the winner once more with the rounding that
files are made with. What loses, or gains less than the standard error of the paired difference, is not used.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from quantize.report import TransformTrial
from quantize.transforms.exact import NotExact
from quantize.transforms.folded import Folded
from quantize.transforms.kinds import CannotFold, Transform
from quantize.transforms.padding import Pad
from quantize.transforms.trials import WIDE, Outcome, Rounding, Trials


@dataclass(frozen=True, slots=True)
class Exploration:
    """All trials in order, and the source under the changes that are used; none where nothing helped."""

    trials: tuple[TransformTrial, ...]
    model: Folded


def pays(found: Outcome, base: Outcome, n_parameters: int) -> bool:
    """Whether a gain is above its own standard error, and above what its bytes would buy anyway.

    A bit more a weight divides divergence by about four, so bytes that a change adds are charged by that law.
    """
    gain, more = found.gain(base), 8 * max(0, found.size_bytes - base.size_bytes) / n_parameters
    if gain.standard_error is None:
        return False
    return gain.mean - base.mean.mean * (1 - 4.0**-more) > gain.standard_error


def explore(source: Folded, trials: Trials, known: Sequence[Transform], *, rounding: Rounding) -> Exploration:
    """Try all of `known` on an unchanged source; `rounding`: what files will be made with."""
    return _Exploring(source, trials, rounding).run(known)


class _Exploring:
    """One exploration; `rows` is the table so far, `start` what is changed, `kind` another type for all."""

    def __init__(self, source: Folded, trials: Trials, rounding: Rounding) -> None:
        self.start, self.trials, self.rounding = source, trials, rounding
        self.kind: str | None = None
        self.rows: list[TransformTrial] = []
        self.tell = trials.ground.progress

    def run(self, known: Sequence[Transform]) -> Exploration:
        """The table and the winner."""
        for pad in (each for each in known if isinstance(each, Pad)):
            self._pad(pad)
        base = self._plain("nearest")
        found: list[tuple[float, Transform, Folded]] = []
        others = [each for each in known if not isinstance(each, Pad)]
        for number, transform in enumerate(others):
            self.tell("trying transforms alone", number, len(others))
            tried = self._try(transform, self.start, base)
            if tried is not None and self._pays(tried[1], base):
                found.append((tried[1].gain(base).mean, transform, tried[0]))
        chosen = self._combined(sorted(found, key=lambda each: -each[0]))
        if len(chosen.folds) > len(self.start.folds) and self.rounding == "best":
            chosen = self._confirmed(chosen)
        used = {fold.name for fold in chosen.folds}
        rows = [replace(row, used=set(row.name.split(" + ")) <= used) for row in self.rows]
        return Exploration(tuple(rows), chosen)

    def _plain(self, rounding: Rounding) -> Outcome:
        self.tell("rounding without transforms", 0, None)
        found = self.trials.run(self.start, rounding=rounding, kind=self.kind)
        self.rows.append(
            TransformTrial(
                _name(self.start),
                rounding,
                type=self.kind,
                kl=found.mean,
                size_bytes=found.size_bytes,
                seconds=found.seconds,
            )
        )
        return found

    def _try(
        self, transform: Transform, start: Folded, base: Outcome, *, kind: str | None = None
    ) -> tuple[Folded, Outcome] | None:
        """A change on top of others, with a row in the table; None where it is impossible, or refused."""
        name = " + ".join((*(fold.name for fold in start.folds), transform.name))
        try:
            if (reason := transform.applies(start.header)) is not None:
                raise CannotFold(reason)
            model = start.then(transform.fold(start))
            found = self.trials.run(model, kind=kind or self.kind)
        except (CannotFold, NotExact) as error:
            self.rows.append(TransformTrial(name, "nearest", _name(start), refused=str(error)))
            return None
        predicted = None if kind else self.trials.predict(model) * base.mean.mean
        self._add(name, "nearest", _name(start), found, base, predicted=predicted, kind=kind)
        return model, found

    def _add(
        self, name: str, rounding: Rounding, compared: str, found: Outcome, base: Outcome,
        *, predicted: float | None = None, kind: str | None = None,
    ) -> None:  # fmt: skip
        row = TransformTrial(
            name, rounding, compared, None, kind or self.kind, predicted, found.mean, found.gain(base),
            found.size_bytes, found.largest_kl, found.seconds,
        )  # fmt: skip
        self.rows.append(row)

    def _pad(self, transform: Transform) -> None:
        """Tried first, since it opens other types to all that follows."""
        types = self.trials.ground.types
        if not isinstance(types, str):
            reason = transform.applies(self.start.header) or "the mix was made for the rows as they are"
            self.rows.append(TransformTrial(transform.name, "nearest", refused=reason))
            return
        self.tell("trying padded rows", 0, None)
        wide, base = WIDE.get(types, types), self.trials.run(self.start)
        tried = self._try(transform, self.start, base, kind=wide)
        if tried is not None and self._pays(tried[1], base):
            self.start, self.kind = tried[0], wide

    def _pays(self, found: Outcome, base: Outcome) -> bool:
        return pays(found, base, self.start.source.n_parameters)

    def _combined(self, found: Sequence[tuple[float, Transform, Folded]]) -> Folded:
        """Those that help, the best one first, each kept where it helps on top of those before it."""
        if not found:
            return self.start
        model = found[0][2]
        base = self.trials.run(model, kind=self.kind)  # it was tried, and is read again
        for number, (_, transform, _) in enumerate(found[1:]):
            self.tell("trying transforms together", number, len(found) - 1)
            tried = self._try(transform, model, base)
            if tried is not None and self._pays(tried[1], base):
                model, base = tried
        return model

    def _confirmed(self, model: Folded) -> Folded:
        """The model, or what it was made from where it gains nothing under the better rounding."""
        base = self._plain("best")
        self.tell("rounding with transforms", 0, None)
        found = self.trials.run(model, rounding="best", kind=self.kind)
        self._add(_name(model), "best", _name(self.start), found, base)
        return model if self._pays(found, base) else self.start


def _name(model: Folded) -> str:
    return " + ".join(fold.name for fold in model.folds) or "none"
