"""What one run of the pipeline was asked for; checked before any work.

Plain values; knows neither the command line nor the steps.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from engine.request import MOST_THREADS
from models.gguf import read_header
from models.lora import Adapter
from quantize.calibration.texts import read_text
from quantize.describe import Description, describe_checkpoint, describe_gguf
from quantize.errors import QuantizeError
from quantize.frame import CannotConverse
from quantize.gguf_files.tensor_types import FOR_WEIGHTS
from quantize.gguf_files.types import DEFAULT_TYPES, refuse_without_importance
from quantize.measure import Backend
from quantize.mixes.allocate import Objective
from quantize.mixes.budget import Budget
from quantize.network.shape import read_shape
from quantize.source import Source, UnusableSource, is_full_precision
from quantize.tokenizer.pretokenizer import check_name


class NeedsCalibration(QuantizeError):
    """A budget without a text to measure by."""

    def __init__(self) -> None:
        super().__init__(
            "--calibration none gives no text to measure by what each tensor loses, which a budget is spent "
            "by; use --calibration self or a text file, or ask for --types"
        )


class NeedsText(QuantizeError):
    """Recovery without a text to train on."""

    def __init__(self) -> None:
        super().__init__(
            "--calibration none gives no text for --recover to train on; use --calibration self or a text "
            "file, or leave --recover out"
        )


#: (what is being done, done, in all or None when unknown)
Progress = Callable[[str, int, int | None], None]


def silent(_what: str, _done: int, _total: int | None) -> None:
    """No progress."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One run. Token counts: `calibration_tokens` read in all, `eval_tokens` scored. `calibration_text`:
    a file that half of a self-written calibration is taken from; None: all is the model's own. `times`:
    where what types take on this machine is kept for all runs; None: with the run. `explore`: a tensor type
    that transforms of the source are tried with; None: none are."""

    source: Source
    out: Path
    types: tuple[str, ...] = DEFAULT_TYPES
    adapter: Path | None = None
    calibration: Literal["self", "none"] | Path = "self"
    calibration_text: Path | None = None
    calibration_tokens: int = 24_576
    eval_tokens: int = 8_192
    eval_text: Path | None = None
    budgets: tuple[Budget, ...] = ()
    objective: Objective = "size"
    explore: str | None = None
    recover: bool = False
    prune_layers: int | Literal["auto"] | None = None
    kv_cache: bool = False
    seed: int = 0
    pre: str | None = None
    keep_source: bool = False
    allow_requantize: bool = False
    n_parallel: int = 16
    times: Path | None = None
    backend: Backend = field(default_factory=Backend)
    command: str = ""

    @property
    def labels(self) -> tuple[str, ...]:
        """The files to make: types, then budgets."""
        return (*self.types, *(budget.label for budget in self.budgets))

    def check(self) -> Description:
        """What the source is; raises for what cannot work, before anything is hashed or written."""
        if self.source.kind == "gguf":
            self._check_gguf()
        self.check_options()
        if self.source.kind == "gguf":
            description = describe_gguf(self.source.path)
        else:
            description = describe_checkpoint(self.source.path, pre=self.pre, adapter=self.adapter)
        if description.mute and (self.calibration == "self" or self.eval_text is None):
            raise CannotConverse(description.mute)
        return description

    def check_options(self) -> None:
        """Raise for what no source could make right, so that none is fetched for it."""
        if not self.labels:
            raise QuantizeError("--types: no type is named, and no budget given by --size or the like")
        self._check_objective()
        if self.calibration == "none":
            self._check_without_text()
        if self.calibration_text is not None and self.calibration != "self":
            raise QuantizeError(
                f"{self.calibration_text} goes beside what the model writes itself, and calibration is "
                f"{self.calibration}; make that self, or leave the text out"
            )
        if self.explore is not None and self.explore not in FOR_WEIGHTS:
            raise QuantizeError(
                f"--explore is {self.explore!r}, no tensor type; give one of {', '.join(FOR_WEIGHTS)}"
            )
        for name, value, least in (
            ("--calibration-tokens", self.calibration_tokens, 256),
            ("--eval-tokens", self.eval_tokens, 64),
        ):
            if value < least:
                raise QuantizeError(f"{name} is {value}; give at least {least}")
        threads = self.backend.n_threads
        if threads is not None and not 1 <= threads <= MOST_THREADS:
            raise QuantizeError(f"--threads is {threads}; give a number from 1 to {MOST_THREADS}")
        if not 0 <= self.seed < 2**32:
            raise QuantizeError(f"--seed is {self.seed}; give a number from 0 to {2**32 - 1}")
        for text in (self.calibration, self.calibration_text, self.eval_text):
            if isinstance(text, Path):
                read_text(text)
        if self.pre is not None:
            check_name(self.pre)
        if self.adapter is not None:
            Adapter.open(self.adapter)
        self._check_out()

    def _check_objective(self) -> None:
        """llama.cpp's recipes are what they are: only a mix can be chosen for speed."""
        if self.objective != "size" and not self.budgets:
            raise QuantizeError(
                f"--objective {self.objective} chooses among mixes, and no budget is given; add --size, "
                "--bits-per-weight or --fit, or leave it out"
            )

    def _check_without_text(self) -> None:
        """Much needs a calibration text."""
        refuse_without_importance(self.types)
        if self.budgets:
            raise NeedsCalibration
        if self.recover:
            raise NeedsText
        if self.prune_layers is not None:
            raise QuantizeError(
                "--calibration none gives no text to measure by what layers matter; use --calibration "
                "self or a text file, or leave out --prune-layers"
            )
        if self.explore is not None:
            raise QuantizeError(
                "--explore tries transforms on calibration text, and --calibration none gives none; use "
                "--calibration self or a text file"
            )

    def _check_out(self) -> None:
        """The folder is there, or can be made in the nearest one that is."""
        nearest = next(path for path in (self.out, *self.out.absolute().parents) if path.exists())
        if not nearest.is_dir():
            raise QuantizeError(f"--out {self.out}: {nearest} is a file; give a folder")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise QuantizeError(f"--out {self.out}: Permission denied in {nearest}; choose another --out")

    def _check_gguf(self) -> None:
        given = self.source.given
        if self.adapter is not None:
            raise UnusableSource(
                given, "--lora is merged into a checkpoint, and this is a GGUF; give its folder"
            )
        header = read_header(self.source.path)
        if header.is_encoder:
            raise UnusableSource(
                given,
                "it is an encoder and predicts no next token to measure by; give a model that writes text",
            )
        if self.recover or self.budgets:
            read_shape(header)
        if self.pre is not None:
            raise UnusableSource(
                given, "--pre is for converting a checkpoint, and this is a GGUF; leave it out"
            )
        whole = is_full_precision(header)
        if (self.budgets or self.explore is not None) and not whole:
            raise UnusableSource(
                given,
                "this GGUF is quantized already, and budgets and --explore want tensors that are not; give "
                "an F32, F16 or BF16 source, or --types alone with --allow-requantize",
            )
        if not whole and not self.allow_requantize:
            raise UnusableSource(
                given,
                "this GGUF is quantized already, and quantizing again adds to its errors; give an F32, "
                "F16 or BF16 source, or --allow-requantize",
            )
