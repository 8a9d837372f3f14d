"""What one `lq tune` was asked for; checked before any work.

Plain values; knows neither the command line nor torch.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import QuantizeError
from quantize.source import Source, UnusableSource
from quantize.tuning.low_rank import BadRank
from quantize.tuning.network import Compute, LoraShape, is_there
from quantize.tuning.training import Schedule

MAX_SEED = 2**31
LENGTH = 1024


class BadOption(QuantizeError):
    """An option outside of what it may be."""

    def __init__(self, option: str, value: object, remedy: str) -> None:
        super().__init__(f"{option} is {value}; give {remedy}")


@dataclass(frozen=True, slots=True)
class Settings:
    """One run. `share` of the chats is held out; `max_length` in tokens, None: LENGTH
    or as much as the model was made for; `final_rank` or `energy` cut the
    adapter afterwards, None: it stays as it was trained. `base`: a GGUF that the adapter is to run beside,
    whose weights take the place of the source's. `distill`: the source's predictions are learnt, not the
    texts. `device` and `compute` are torch's."""

    source: Source
    data: Path
    out: Path
    name: str
    shape: LoraShape
    schedule: Schedule
    four_bit: bool
    max_length: int | None
    share: float
    final_rank: int | None
    energy: float | None
    base: Path | None
    distill: bool
    device: str
    compute: Compute
    checkpointing: bool
    command: str

    def check(self) -> None:
        """Raise for what no model and no data could make right."""
        for option, value, good, remedy in self._rules():
            if not good:
                raise BadOption(option, value, remedy)
        if self.final_rank is not None and self.energy is not None:
            raise BadRank("--final-rank and --energy both say how far the adapter is cut; give one of them")
        if self.final_rank is not None and not 1 <= self.final_rank <= self.shape.rank:
            raise BadRank(
                f"--final-rank is {self.final_rank} and --rank {self.shape.rank}; give 1 to {self.shape.rank}"
            )
        if self.distill and self.base is None:
            raise QuantizeError(
                "--objective distill brings a quantized model back to its source; give it as --base FILE.gguf"
            )
        if self.base is not None and self.four_bit:
            raise QuantizeError("--base and --qlora both say how the model is rounded; give one of them")
        self._check_out()

    def _rules(self) -> list[tuple[str, object, bool, str]]:
        shape, schedule = self.shape, self.schedule
        energy, steps, length = self.energy, schedule.max_steps, self.max_length
        return [
            (
                "--device",
                self.device,
                is_there(self.device),
                "cpu, or cuda or cuda:N where there is such a GPU",
            ),
            ("--rank", shape.rank, shape.rank >= 1, "1 or more, such as 16"),
            ("--alpha", shape.alpha, 0 < shape.alpha < 1e6, "a number above 0, such as 32"),
            ("--dropout", shape.dropout, 0 <= shape.dropout < 1, "a share from 0 to below 1"),
            ("--epochs", schedule.epochs, schedule.epochs >= 1, "1 or more"),
            ("--max-steps", steps, steps is None or steps >= 1, "1 or more"),
            ("--batch-size", schedule.batch_size, schedule.batch_size >= 1, "1 or more"),
            ("--micro-tokens", schedule.micro_tokens, schedule.micro_tokens >= 1, "1 or more"),
            (
                "--learning-rate",
                schedule.learning_rate,
                0 < schedule.learning_rate <= 1,
                "above 0, such as 2e-4",
            ),
            ("--max-length", length, length is None or length >= 8, "8 tokens or more"),
            ("--held-out", self.share, 0 <= self.share < 1, "a share from 0 to below 1, such as 0.1"),
            (
                "--energy",
                energy,
                energy is None or 0 < energy <= 1,
                "a share above 0 and up to 1, such as 0.99",
            ),
            ("--seed", schedule.seed, 0 <= schedule.seed < MAX_SEED, f"a number from 0 to {MAX_SEED - 1}"),
        ]

    def _check_out(self) -> None:
        """The folder is there, or can be made in the nearest one that is."""
        nearest = next(path for path in (self.out, *self.out.absolute().parents) if path.exists())
        if not nearest.is_dir():
            raise QuantizeError(f"--out {self.out}: {nearest} is a file; give a folder")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise QuantizeError(f"--out {self.out}: Permission denied in {nearest}; choose another --out")

    def check_source(self) -> None:
        """Only a checkpoint has weights to learn beside."""
        if self.source.kind != "checkpoint":
            raise UnusableSource(
                self.source.given,
                "this is a GGUF, and tuning needs the checkpoint that it was made of; give its folder or "
                "hf:ORG/NAME",
            )

    def identity(self) -> dict[str, Any]:
        """What the trained weights depend on, beside source and data, by option; for the lock on a folder."""
        shape, schedule = self.shape, self.schedule
        return {
            "--rank": shape.rank,
            "--alpha": shape.alpha,
            "--dropout": shape.dropout,
            "--modules": ",".join(shape.modules) or "all",
            "--qlora": self.four_bit,
            "--objective": "distill" if self.distill else "chats",
            "--dtype": self.compute,
            "--epochs": schedule.epochs,
            "--max-steps": schedule.max_steps,
            "--batch-size": schedule.batch_size,
            "--learning-rate": schedule.learning_rate,
            "--warmup": schedule.warmup,
            "--evaluations": schedule.evaluations,
            "--max-length": self.max_length,
            "--held-out": self.share,
            "--seed": schedule.seed,
        }
