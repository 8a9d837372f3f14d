"""What a finished run's parts give alone: files of chosen types, rounded one way or the other, and measured.

Works on the folder of an `lq quantize --size ... --keep-source` run: its source, texts, importance matrix and
sensitivities. What was measured is kept, so a stopped study goes on.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from benchmarks.quantizing.stock import Measured, Yard
from models.gguf import read_header
from quantize.calibration.conversation import read
from quantize.calibration.imatrix import ImportanceMatrix
from quantize.gguf_files.child import quantize
from quantize.gguf_files.mixed_file import ImportanceNote, MixedSource, Parts, write_mixed
from quantize.gguf_files.types import Order
from quantize.measure import Passage, passages
from quantize.mixes.candidates import TYPES, Candidates
from quantize.mixes.encoding import Nearest
from quantize.mixes.workshop import WINDOW, Workshop
from quantize.network.hessian import Hessians
from quantize.network.network import Network
from quantize.network.stream import cut, forward
from quantize.sensitivity.record import Sensitivities
from quantize.source import digest

Rounding = Literal["nearest", "best", "in order"]


@dataclass(frozen=True)
class Bench:
    """A run's folder, and a folder for what is made here.

    `calibrated`: a folder with another calibration.jsonl and the imatrix.gguf collected on it, by which
    tensors are rounded instead of the run's.
    """

    yard: Yard
    calibrated: Path | None = None

    @cached_property
    def source(self) -> MixedSource:
        """The run's full-precision model."""
        return MixedSource.open(self.yard.source)

    @cached_property
    def sensitivities(self) -> Sensitivities:
        """What the run found that each type costs each tensor."""
        return Sensitivities.load(self.yard.run / "work" / "sensitivities.npz")

    @cached_property
    def choices(self) -> dict[str, dict[str, int]]:
        """Tensor -> type -> bytes."""
        return self.source.choices(TYPES)

    @property
    def matrix(self) -> Path:
        """The importance matrix, the run's own by default."""
        return (self.calibrated or self.yard.run) / "imatrix.gguf"

    @property
    def text(self) -> Path:
        """The calibration text, the run's own by default."""
        return (self.calibrated or self.yard.run / "work") / "calibration.jsonl"

    @property
    def folder(self) -> Path:
        """For what is made of that text."""
        return self.calibrated or self.yard.out

    @cached_property
    def candidates(self) -> Candidates:
        """The importance that rounding uses."""
        return Candidates(ImportanceMatrix.read(self.matrix).means())

    @cached_property
    def hessians(self) -> Hessians:
        """Collected over all of the calibration text, where that is not done yet."""
        folder = self.folder / "hessians"
        folder.mkdir(parents=True, exist_ok=True)
        found = Hessians(folder, f"{digest(self.text)} {WINDOW}")
        tokens = [conversation.tokens for conversation in read(self.text)]
        windows = cut(tokens, WINDOW)
        self.yard.say("collecting Hessians")
        forward(Network.open(self.yard.source), windows, hessians=found)
        return found

    def stock_types(self, kind: str) -> dict[str, str]:
        """The type that llama.cpp's recipe gives each tensor that it rounds."""
        kept = self.yard.out / f"types-{kind}.json"
        if not kept.exists():
            out = self.yard.out / f"{kind}.gguf"
            quantize(Order(self.yard.source, out, kind, self.matrix, self.yard.backend.n_threads or 0))
            kept.write_text(json.dumps({t.name: t.type.name for t in read_header(out).tensors}), "utf-8")
            out.unlink()
        return {
            name: type_ for name, type_ in json.loads(kept.read_text("utf-8")).items() if name in self.choices
        }

    def predicted(self, types: Mapping[str, str]) -> float:
        """Mean KLD that the sensitivities predict for rounding to nearest on a CPU, cross terms left out."""
        found = self.sensitivities
        return found.predict(types, self._costs) + sum(found.of_inputs(*each) for each in types.items())

    @cached_property
    def _costs(self):
        return self.sensitivities.shrunk()

    def measure(self, name: str, types: Mapping[str, str], rounding: Rounding) -> Measured:
        """Write the file, measure it, remove it."""
        named = f"{name}, {rounding}"
        by = [] if self.calibrated is None else [digest(self.text)]
        identity = hashlib.sha256(json.dumps([named, dict(types), *by]).encode()).hexdigest()[:12]
        return self.yard.once(f"{named} {identity}", lambda out: self.write(out, types, rounding))

    def write(self, out: Path, types: Mapping[str, str], rounding: Rounding) -> None:
        """A file of these types; tensors rounded on their own are kept for other files."""
        if rounding == "nearest":
            parts = Parts(self.folder / "nearest")
            parts.folder.mkdir(parents=True, exist_ok=True)
            key = digest(self.matrix)
            encode = Nearest(self.candidates)
            write_mixed(
                self.source, out, types, encode, parts=parts, made_from=lambda *_: f"nearest {key}",
                note=self.note,
            )  # fmt: skip
            return
        self.workshop.alone(out, types, "rounding")
        if rounding == "in order" and not self.workshop.in_order(out, types, "rounding in order"):
            raise SystemExit(f"{self.text} is too short to round layers in order")

    @property
    def note(self) -> ImportanceNote:
        """Of the run's importance matrix."""
        return ImportanceNote(self.matrix.name, len(self.candidates.means))

    @cached_property
    def workshop(self) -> Workshop:
        """As the run's own."""
        return Workshop(
            source=self.source, folder=self.folder, texts=self.text, passages=self._passages,
            candidates=self.candidates, hessians=self.hessians, lattices={}, note=self.note,
            key=digest(self.matrix), backend=self.yard.backend, progress=lambda *_: None,
        )  # fmt: skip

    def _passages(self) -> list[Passage]:
        """What files are chosen by: what the model wrote itself, and windows of a text."""
        return passages(read(self.text), "assistant", "text")
