"""The training loop: batches in a fixed order, Adam, early stopping by windows that are never trained on.

It stops and goes on: the state is stored every few seconds, and what follows from it is the same as if it
had not stopped. Owns no model files.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.atomic import whole
from quantize.errors import QuantizeError
from quantize.recovery.knobs import Kind
from quantize.recovery.loss import Teacher, backward, divergence
from quantize.recovery.student import Student

#: (what, steps done, in all)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """How it is trained. Rates are steps in a knob's own unit: .001 moves a scale by a thousandth of itself.

    `tokens` are read in all, over several passes where the windows have fewer; `batch` windows a step.
    `held_back` is the share of the windows that only checks see, and `checks` how often they do; after
    one that is no better than the best, training goes on from the best at `slower` times the rates, and after
    `patience` of them in a row it ends. `decay` pulls towards the file as it was.
    """

    tokens: int = 40_000
    batch: int = 4
    scale_rate: float = 2e-4
    norm_rate: float = 1e-3
    row_rate: float = 3e-4
    warm_up: float = 0.1
    decay: float = 0.0
    held_back: float = 0.125
    checks: int = 10
    patience: int = 4
    slower: float = 0.25
    seed: int = 0

    def check(self) -> None:
        """Raise for what cannot work."""
        for name, value, lowest, highest in (
            ("tokens", self.tokens, 1, math.inf), ("batch", self.batch, 1, math.inf),
            ("scale_rate", self.scale_rate, 0, 1), ("norm_rate", self.norm_rate, 0, 1),
            ("row_rate", self.row_rate, 0, 1),
            ("warm_up", self.warm_up, 0, 1), ("decay", self.decay, 0, math.inf),
            ("checks", self.checks, 1, math.inf), ("patience", self.patience, 1, math.inf),
            ("slower", self.slower, 0, 1),
        ):  # fmt: skip
            if not lowest <= value <= highest:
                raise QuantizeError(f"recovery: {name} is {value}; give {lowest} to {highest}")
        if not 0 < self.held_back < 1:
            raise QuantizeError(f"recovery: held_back is {self.held_back}; give a share between 0 and 1")

    def rate(self, kind: Kind) -> float:
        """At its highest."""
        return {"norms": self.norm_rate, "scales": self.scale_rate, "rows": self.row_rate}[kind]


class TooFewWindows(QuantizeError):
    """Too little text to train on some and check on the rest."""

    def __init__(self, n_windows: int) -> None:
        super().__init__(
            f"recovery needs at least 2 windows, one to train on and one to check by, and the text gives "
            f"{n_windows}; raise --calibration-tokens"
        )


@dataclass(slots=True)
class State:
    """Where a training is. `offsets`, `moments` (first and second) and `best` go by knob; `pace` is what
    rates are multiplied with, `begun` the step that the moments count from."""

    step: int
    offsets: list[Tensor]
    moments: list[Tensor]
    best: list[Tensor]
    best_step: int = 0
    pace: float = 1.0
    begun: int = 0
    history: list[tuple[int, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @classmethod
    def new(cls, student: Student) -> "State":
        offsets = [knob.offset.detach() for knob in student.knobs.values()]
        zeros = [torch.zeros_like(offset) for offset in offsets]
        return cls(0, offsets, [*map(torch.clone, zeros), *map(torch.clone, zeros)], zeros)

    @property
    def start_kl(self) -> float:
        """Mean divergence of the file as it was, over the windows that are held back."""
        return self.history[0][1]

    @property
    def best_kl(self) -> float:
        """That of the best state."""
        return dict(self.history)[self.best_step]

    def go_back(self, slower: float) -> None:
        """To the best, and on from there at lower rates."""
        with torch.no_grad():
            for offset, best in zip(self.offsets, self.best, strict=True):
                offset.copy_(best)
            for moment in self.moments:
                moment.zero_()
        self.pace, self.begun = self.pace * slower, self.step

    def save(self, path: Path, key: str) -> None:
        """Store it whole."""
        values = {name: getattr(self, name) for name in self.__slots__}
        with whole(path) as partial:
            torch.save({"key": key, **values}, partial)

    def restore(self, path: Path, key: str) -> None:
        """Become what was saved under the same key, if anything was."""
        try:
            found: dict[str, Any] = torch.load(path, map_location=self.offsets[0].device, weights_only=True)
        except FileNotFoundError:
            return
        if found.pop("key") != key:
            return
        with torch.no_grad():
            for mine, stored in zip(self.offsets, found.pop("offsets"), strict=True):
                mine.copy_(stored)
        for name, value in found.items():
            setattr(self, name, value)
        self.history = [(step, kl) for step, kl in self.history]


@dataclass(slots=True)
class Training:
    """One file's training over (windows, tokens) ids; the last of the windows are held back."""

    student: Student
    teacher: Teacher
    windows: np.ndarray
    settings: Settings
    path: Path
    key: str
    progress: Progress

    @property
    def n_trained(self) -> int:
        """Windows that are trained on, the first ones: neighbours are of one text."""
        return n_trained(len(self.windows), self.settings)

    @property
    def n_steps(self) -> int:
        """Of a batch each."""
        return max(1, round(self.settings.tokens / (self.settings.batch * self.windows.shape[1])))

    def run(self) -> State:
        """Train to the end, or on from where it was stopped; the student then has the best state."""
        state = State.new(self.student)
        state.restore(self.path, self.key)
        if not state.history:
            self._check(state)
        every, saved = max(1, round(self.n_steps / self.settings.checks)), time.monotonic()
        while state.step < self.n_steps and not self._is_over(state):
            self.progress("recovering", state.step, self.n_steps)
            state.losses.append(self._step(state))
            state.step += 1
            if not math.isfinite(state.losses[-1]):
                state.go_back(self.settings.slower)
            if state.step % every == 0 or state.step == self.n_steps:
                self._check(state)
            elif time.monotonic() - saved > SAVE_S:
                state.save(self.path, self.key)
                saved = time.monotonic()
        state.go_back(1.0)
        return state

    def _is_over(self, state: State) -> bool:
        steps = [step for step, _ in state.history]
        return sum(step > state.best_step for step in steps) >= self.settings.patience

    def _check(self, state: State) -> None:
        """Measure the held-back windows, keep the state if it is the best, and store it all."""
        held_back = np.arange(self.n_trained, len(self.windows))
        self.progress("recovering: checking", state.step, self.n_steps)
        kl = float(divergence(self.student, self.teacher, self.windows, held_back).mean())
        if not state.history or kl < state.best_kl:
            state.best, state.best_step = [offset.clone() for offset in state.offsets], state.step
        else:
            state.go_back(self.settings.slower)
        state.history.append((state.step, kl))
        state.save(self.path, self.key)

    def _step(self, state: State) -> float:
        """One batch; the mean divergence over it before the step."""
        chosen = batch(state.step, self.n_trained, self.settings)
        for knob in self.student.knobs.values():
            knob.offset.grad = None
        loss = 0.0
        for part in at_once(chosen, self.windows.shape[1]):
            tokens = torch.from_numpy(self.windows[part]).to(self.student.device)
            share = len(part) / len(chosen)
            loss += share * backward(self.student, self.teacher, tokens, part, share)
        self._adam(state)
        return loss

    def _adam(self, state: State) -> None:
        """Adam with decay apart from the gradient (AdamW), in place."""
        now = state.pace * schedule(state.step, self.n_steps, self.settings.warm_up)
        first, second = np.split(np.arange(len(state.moments)), 2)
        with torch.no_grad():
            for index, knob in enumerate(self.student.knobs.values()):
                rate = now * self.settings.rate(knob.kind)
                if knob.offset.grad is None or not rate:
                    continue
                mean, square = state.moments[first[index]], state.moments[second[index]]
                adam(knob.offset, knob.offset.grad, mean, square, step=state.step - state.begun, rate=rate)
                knob.offset.mul_(1 - rate * self.settings.decay)


BETAS = 0.9, 0.98
SAVE_S = 20.0
#: Computed at once, so that activations take no more however large a batch is; fewer leave cores waiting.
TOKENS = 512


def at_once(chosen: np.ndarray, size: int) -> list[np.ndarray]:
    """The windows of a batch in parts that are computed at once."""
    step = max(1, TOKENS // size)
    return [chosen[start : start + step] for start in range(0, len(chosen), step)]


def adam(offset: Tensor, grad: Tensor, mean: Tensor, square: Tensor, *, step: int, rate: float) -> None:
    """One step of Adam, all in place; `step` counts from 0."""
    mean.lerp_(grad, 1 - BETAS[0])
    square.lerp_(grad.square(), 1 - BETAS[1])
    scale = math.sqrt(1 - BETAS[1] ** (step + 1)) / (1 - BETAS[0] ** (step + 1))
    # gradients that are exactly zero, as of blocks whose scale is, must not divide by zero
    offset.addcdiv_(mean, square.sqrt().add_(1e-30), value=-rate * scale)


def n_trained(n_windows: int, settings: Settings) -> int:
    """How many of the windows are trained on; the others are held back."""
    return n_windows - max(1, round(settings.held_back * n_windows))


def schedule(step: int, n_steps: int, warm_up: float) -> float:
    """Share of the highest rate: up in a line, then down as a cosine."""
    warm = max(1, round(warm_up * n_steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, n_steps - warm)))


def batch(step: int, n_windows: int, settings: Settings) -> np.ndarray:
    """The windows of a step: all windows are taken once, in some order, then again in another."""
    size = min(settings.batch, n_windows)
    places = np.arange(step * size, (step + 1) * size)
    orders = {
        epoch: np.random.default_rng((settings.seed, epoch)).permutation(n_windows)
        for epoch in np.unique(places // n_windows)
    }
    return np.array([orders[place // n_windows][place % n_windows] for place in places])


def parameters(settings: Settings) -> dict[str, Any]:
    """What a result depends on, for keys."""
    return {"betas": BETAS, **asdict(settings)}
