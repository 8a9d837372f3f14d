"""Measure files against a run's source on the run's own held-out texts; make llama.cpp's recipes for it.

What was measured is kept in one JSON file, so a stopped run goes on. A recipe's file is deleted once it is
measured.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from quantize.calibration.conversation import Role, read
from quantize.divergence import Divergence
from quantize.gguf_files.child import quantize
from quantize.gguf_files.types import Order
from quantize.measure import Backend, Passage, measure, passages, some, write_reference
from quantize.mixes.workshop import VERSION
from quantize.network.stream import digest_of
from quantize.report import divergence_of
from quantize.source import digest
from quantize.speed import measure_speed
from quantize.steps import write_text

TEXTS: Mapping[str, Role] = {"evaluation": "assistant", "text": "text"}
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Measured:
    """One file: `chats` and `text` are None where the run has no such text; `decode` in tokens a second."""

    name: str
    size_bytes: int
    chats: Divergence | None
    text: Divergence | None
    decode: float


@dataclass(frozen=True, slots=True)
class Yard:
    """A run's folder, whose source and texts everything is measured with; results lie in `out`. `n_scored`:
    about how many tokens of each text are scored; None: all."""

    run: Path
    out: Path
    backend: Backend
    say: Say
    n_scored: int | None = None

    @classmethod
    def open(cls, run: Path, out: Path, backend: Backend, say: Say, n_scored: int | None = None) -> "Yard":
        """In a folder below `out` for this model, these texts, this matrix and the rounding of this version:
        nothing that was measured with others is taken for theirs."""
        used = [run / "imatrix.gguf", *(run / "work" / name for name in ("source.gguf", "calibration.jsonl"))]
        used += [run / "work" / f"{text}.jsonl" for text in TEXTS]
        told = [VERSION, backend.n_threads, *(digest(path) if path.exists() else None for path in used)]
        folder = out / digest_of(*told)[:12]
        folder.mkdir(parents=True, exist_ok=True)
        return cls(run, folder, backend, say, n_scored)

    @property
    def source(self) -> Path:
        """The run's full-precision GGUF, there after --keep-source."""
        return self.run / "work" / "source.gguf"

    @property
    def suffix(self) -> str:
        """What tells files of fewer scored tokens from those of all."""
        return f"-{self.n_scored}" if self.n_scored else ""

    def texts(self) -> dict[str, list[Passage]]:
        """The held-out texts that the run has, with what of them is scored."""
        found = {}
        for name, role in TEXTS.items():
            path = self.run / "work" / f"{name}.jsonl"
            if path.exists():
                scored = passages(read(path), role)
                found[name] = some(scored, self.n_scored) if self.n_scored else scored
        return found

    def recipe(self, kind: str, matrix_name: str, matrix: Path) -> Measured:
        """llama.cpp's own recipe with an importance matrix."""
        threads = self.backend.n_threads or 0
        name = f"{kind}, {matrix_name} {digest(matrix)[:8]}"
        return self.once(name, lambda out: _quantize(Order(self.source, out, kind, matrix, threads)))

    def once(self, name: str, make: Callable[[Path], None]) -> Measured:
        """A file that `make` writes where it is told to, measured, deleted; unless that was done before."""
        if (known := self._known(name)) is not None:
            return known
        out = self.out / "candidate.gguf"
        self.say(f"making {name}")
        make(out)
        try:
            return self._measure(name, out)
        finally:
            out.unlink(missing_ok=True)

    def file(self, path: Path) -> Measured:
        """A file that somebody made; measured anew when it changed."""
        name = f"{path.stem} {digest(path)[:12]}"
        return self._known(name) or self._measure(name, path)

    def _measure(self, name: str, path: Path) -> Measured:
        found: dict[str, Divergence] = {}
        for text, scored in self.texts().items():
            self.say(f"measuring {name} on {text}")
            found[text] = measure(path, scored, self._reference(text, scored), backend=self.backend)
        speed = measure_speed(path, backend=self.backend)
        size = path.stat().st_size
        measured = Measured(name, size, found.get("evaluation"), found.get("text"), speed.decode)
        kept = self._kept() | {name: dataclasses.asdict(measured)}
        write_text(self.out / f"measured{self.suffix}.json", json.dumps(kept, indent=1))
        return measured

    def _reference(self, text: str, scored: list[Passage]) -> Path:
        path = self.out / f"reference-{text}{self.suffix}.f32"
        if not path.exists():
            self.say(f"predicting {text} with the source")
            write_reference(self.source, scored, path, backend=self.backend)
        return path

    def _known(self, name: str) -> Measured | None:
        record = self._kept().get(name)
        if record is None:
            return None
        both = {text: divergence_of(record[text]) for text in ("chats", "text")}
        return Measured(**{**record, **both})

    def _kept(self) -> dict[str, dict]:
        path = self.out / f"measured{self.suffix}.json"
        return json.loads(path.read_text("utf-8")) if path.exists() else {}


def _quantize(order: Order) -> None:
    quantize(order)
