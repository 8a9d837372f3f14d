"""The step from a rounded file to a recovered one: train it, measure both on text held back, keep the better.

What the training is, `quantize.recovery.recover` knows; which steps run, `quantize.steps`.
"""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from models.atomic import whole
from quantize.calibration.conversation import read
from quantize.gguf_files.typemap import read_types
from quantize.measure import Backend, Passage, measure, write_reference
from quantize.network.stream import cut
from quantize.recovery.recover import VERSION, recover
from quantize.recovery.recovered import Recovered
from quantize.recovery.training import Settings, n_trained, parameters
from quantize.source import digest
from quantize.steps import Facts, Step

#: Tokens of a window: a training step has several, and attention little.
WINDOW = 128
#: Tokens held back that the engine measures both files on.
JUDGING_TOKENS = 2048

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True, slots=True)
class Recoveries:
    """The recovered files of one run. `ready` are the source and the calibration, whose texts lie in `texts`;
    `folder` is for what lies there meanwhile."""

    source: Path
    texts: Path
    folder: Path
    backend: Backend
    progress: Progress
    ready: tuple[Step, Step]
    settings: Settings = field(default_factory=Settings)

    def step(self, kind: str, rounded: Step, out: Path) -> Step:
        """The file of one type or budget, made from what `rounded` writes."""
        values = {"version": VERSION, "window": WINDOW, "judging": JUDGING_TOKENS}
        return Step(
            f"recovered-{kind}",
            lambda: self._make(kind, rounded.outputs[0], out),
            {**values, **parameters(self.settings)},
            (*self.ready, rounded),
            (out,),
            rounded.least_bytes,
        )

    def _make(self, kind: str, rounded: Path, out: Path) -> Facts:
        tokens = [conversation.tokens for conversation in read(self.texts)]
        windows = cut(tokens, WINDOW)
        folder = self.folder / "recovery"
        candidate = folder / f"{kind}.gguf"

        def tell(what: str, done: int, total: int) -> None:
            heading, colon, rest = what.partition(":")
            self.progress(f"{heading} {kind}{colon}{rest}", done, total)

        trained = recover(
            self.source, rounded, windows, candidate, settings=self.settings, progress=tell, folder=folder
        )
        held_back = windows[n_trained(len(windows), self.settings) :]
        judged = self._judge((rounded, candidate), held_back, kind) if trained.helped else None
        kept = judged is not None and judged[1]["mean"] < judged[0]["mean"]
        if kept:
            candidate.replace(out)
        else:
            with whole(out) as partial:
                shutil.copyfile(rounded, partial)
            candidate.unlink()
        return {
            "sha256": digest(out),
            "types": dataclasses.asdict(read_types(out)),
            "kept": kept,
            "judged": judged,
            "trained": dataclasses.asdict(trained),
        }

    def _judge(self, files: Sequence[Path], windows: np.ndarray, kind: str) -> list[dict[str, float]]:
        """The mean divergence of each file, by the engine, with its standard error."""
        few = windows[: max(2, JUDGING_TOKENS // windows.shape[1])]
        texts = [Passage(tuple(window), tuple(range(1, len(window)))) for window in few.tolist()]
        reference = self.folder / "recovery" / "reference.f32"
        found = []
        try:
            self.progress(f"judging {kind}", 0, len(files))
            write_reference(self.source, texts, reference, backend=self.backend)
            for number, path in enumerate(files):
                self.progress(f"judging {kind}", number, len(files))
                kl = measure(path, texts, reference, backend=self.backend).kl
                found.append(dataclasses.asdict(kl))
        finally:
            reference.unlink(missing_ok=True)
        return found


def trained_of(facts: Facts) -> Recovered:
    """What a step recorded of the training."""
    found = facts["trained"]
    return Recovered(**{**found, "history": tuple((step, kl) for step, kl in found["history"])})
