"""The loop: AdamW over the adapter's factors, a cosine for the step size, held-out loss on the way.

A step's gradient is that of the mean over the assistant's tokens of its sequences, however they are cut into
batches that fit. Nothing depends on the clock or on how often it was interrupted.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantize.errors import QuantizeError
from quantize.tuning.encoding import Example
from quantize.tuning.evaluation import mean_loss
from quantize.tuning.network import Tunable
from quantize.tuning.order import learning_rate, micro_batches, steps
from quantize.tuning.state import Progressed, State

#: (what is being done, done, in all)
Progress = Callable[[str, int, int | None], None]
#: A line for who watches.
Tell = Callable[[str], None]
SAVE_SECONDS = 30.0  # between two saved states, and never more than a twentieth of the time for saving


class Diverged(QuantizeError):
    """A loss that is no number any more."""

    def __init__(self, step: int, rate: float) -> None:
        super().__init__(
            f"the loss of step {step} is not finite; lower --learning-rate (it was {rate:g}) and choose "
            "another --out, or delete this one"
        )


@dataclass(frozen=True, slots=True)
class Schedule:
    """How it is learnt. `batch_size` counts sequences a step, `micro_tokens` tokens computed at once."""

    epochs: int = 3
    max_steps: int | None = None
    batch_size: int = 8
    micro_tokens: int = 4096
    learning_rate: float = 2e-4
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    evaluations: int = 10
    seed: int = 0

    def n_steps(self, n_examples: int) -> int:
        """Steps in all."""
        epoch = -(-n_examples // self.batch_size)
        return min(self.epochs * epoch, self.max_steps or self.epochs * epoch)

    def evaluated(self, step: int, n_steps: int) -> bool:
        """Whether the held-out loss is taken after `step` steps: spread evenly, after the last one always."""
        return step * self.evaluations // n_steps > (step - 1) * self.evaluations // n_steps


class Training:
    """One training from its start or its saved state to its end."""

    def __init__(
        self,
        tunable: Tunable,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        schedule: Schedule,
        path: Path,
    ) -> None:
        self.tunable, self.examples, self.held_out = tunable, examples, held_out
        self.schedule, self.path = schedule, path
        self.n_steps = schedule.n_steps(len(examples))
        self.parameters = tunable.parameters
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay
        )
        self.told, self.best = Progressed(), {}
        self.lengths = [len(example.tokens) for example in examples]

    def run(self, *, progress: Progress, tell: Tell) -> Progressed:
        """Go on to the end; the tunable has the weights of the best step then."""
        if self.path.is_file():
            self._restore()
        self.tunable.model.train()
        saved_at, save_cost = time.monotonic(), 0.0
        while self.told.step < self.n_steps:
            started = time.monotonic()
            loss = self._step()
            self.told.seconds += time.monotonic() - started
            evaluated = self.schedule.evaluated(self.told.step, self.n_steps)
            if evaluated and self.held_out:
                progress(f"training: held-out loss after step {self.told.step}", self.told.step, self.n_steps)
                tell(self._evaluate(loss))
            now = time.monotonic()
            progress(f"training: loss {loss:.3f}", self.told.step, self.n_steps)
            if evaluated or now - saved_at > max(SAVE_SECONDS, 20 * save_cost):
                self._save()
                saved_at = time.monotonic()
                save_cost = saved_at - now
        self._use_best()
        return self.told

    def _step(self) -> float:
        """One update; returns the loss before it."""
        number, schedule = self.told.step, self.schedule
        chosen = self._chosen(number)
        n_wanted = sum(self.examples[i].n_wanted for i in chosen)
        torch.manual_seed(schedule.seed * 1_000_003 + number)  # of dropout: the same after an interruption
        total = 0.0
        for batch in micro_batches(self.lengths, chosen, limit=schedule.micro_tokens):
            loss = self.tunable.token_losses([self.examples[i] for i in batch]).sum() / n_wanted
            loss.backward()
            total += float(loss.detach())
        rate = learning_rate(
            number,
            n_steps=self.n_steps,
            n_warm=round(schedule.warmup * self.n_steps),
            peak=schedule.learning_rate,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), schedule.clip)
        if not bool(torch.isfinite(norm)):
            raise Diverged(number + 1, schedule.learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.told.step += 1
        self.told.n_tokens += sum(self.lengths[i] for i in chosen)
        self.told.n_learnt += n_wanted
        self.told.training.append((self.told.step, total))
        return total

    def _chosen(self, step: int) -> list[int]:
        a_epoch = -(-len(self.examples) // self.schedule.batch_size)
        order = steps(
            len(self.examples),
            batch_size=self.schedule.batch_size,
            seed=self.schedule.seed,
            epoch=step // a_epoch,
        )
        return order[step % a_epoch]

    def _evaluate(self, loss: float) -> str:
        """Take the held-out loss and remember the best; returns what to say of it."""
        found = mean_loss(self.tunable, self.held_out, limit=self.schedule.micro_tokens)
        told = self.told
        told.held_out.append((told.step, found))
        is_best = told.best_loss is None or found < told.best_loss
        if is_best:
            told.best_step, told.best_loss = told.step, found
            self.best = {
                name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()
            }
        standing = "the best so far" if is_best else f"best {told.best_loss:.4f} after step {told.best_step}"
        losses = f"loss {loss:.4f} on its batch, {found:.4f} held out"
        return f"step {told.step} of {self.n_steps}: {losses} ({standing})"

    def _use_best(self) -> None:
        if self.best:
            _assign(self.parameters, self.best)
        else:
            self.told.best_step = self.told.step

    def _save(self) -> None:
        moments: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                moments[f"{key}/{name}"] = value
        State(self.told, dict(self.parameters), self.best, moments).save(self.path)

    def _restore(self) -> None:
        state = State.load(self.path, {name: parameter.shape for name, parameter in self.parameters.items()})
        self.told, self.best = state.told, state.best
        _assign(self.parameters, state.weights)
        for name, parameter in self.parameters.items():
            device = parameter.device
            self.optimizer.state[parameter] = {
                key: state.moments[f"{key}/{name}"].to("cpu" if key == "step" else device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }


def _assign(parameters: dict[str, torch.nn.Parameter], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
