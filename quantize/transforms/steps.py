"""The steps of a run that tries transforms: what each gave, and the source that files are then made from.

Owns which text is held back for trying, and the files in between. Divergence of the finished files is still
measured against the unchanged source.
"""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors.numpy import load_file, save_file

from models.atomic import whole
from quantize.calibration.conversation import Conversation, Role, read
from quantize.calibration.imatrix import ImportanceMatrix
from quantize.errors import QuantizeError
from quantize.measure import Backend, passages
from quantize.network.hessian import Hessians
from quantize.network.network import Network
from quantize.network.stream import cut, forward
from quantize.report import TransformTrial
from quantize.steps import Facts, Step, write_text
from quantize.transforms.biases import correct
from quantize.transforms.explore import explore
from quantize.transforms.folded import Folded
from quantize.transforms.kinds import Transform, transforms
from quantize.transforms.trials import Ground, Progress, Rounding, Trials, nearest

#: Changes when the same inputs come to other numbers.
VERSION = 2
WINDOW = 128  # tokens that moments are collected on at a time
#: One conversation in so many is measured on, and not among those that moments are collected on.
HELD_BACK = 5
FEWEST = 4  # calibration sequences: two of them are held back, as a standard error needs


class TooFewTexts(QuantizeError):
    """Calibration text that leaves nothing to measure on."""

    def __init__(self, found: int) -> None:
        super().__init__(
            f"--explore holds some calibration sequences back to measure on, and there are {found}; give "
            f"--calibration-tokens enough for {FEWEST} or more"
        )


@dataclass(frozen=True, slots=True)
class Request:
    """What is tried on: a full-precision source, its calibration text and importance matrix, and a type.

    `rounding`: what files will be made with; `roles`: whose tokens are scored; `folder`: what lies there
    meanwhile.
    """

    source: Path
    folder: Path
    calibration: Path
    matrix: Path
    type: str
    rounding: Rounding
    roles: tuple[Role, ...]
    seed: int
    backend: Backend
    progress: Progress


class Transforms:
    """The steps. `ready` are the source, the calibration and the importance."""

    def __init__(self, request: Request, ready: tuple[Step, Step, Step]) -> None:
        self.request, self.ready = request, ready

    @property
    def file(self) -> Path:
        """What files are made from: the changed source, or a link to the source itself."""
        return self.request.folder / "transformed.gguf"

    @property
    def matrix(self) -> Path:
        """Its importance matrix."""
        return self.request.folder / "imatrix.gguf"

    @property
    def _record(self) -> Path:
        return self.request.folder / "used.json"

    @property
    def _means(self) -> Path:
        return self.request.folder / "means.safetensors"

    @cached_property
    def explored(self) -> Step:
        """Which changes pay."""
        request = self.request
        parameters = {
            "version": VERSION,
            "type": request.type,
            "rounding": request.rounding,
            "seed": request.seed,
            "window": WINDOW,
            "held_back": HELD_BACK,
        }
        return Step("exploration", self._explore, parameters, self.ready, (self._record,))

    def _explore(self) -> Facts:
        known, source = self._known, Folded.open(self.request.source, self._hessians)
        reasons = {each.name: each.applies(source.header) for each in known}
        if all(reasons.values()):
            trials = [TransformTrial(name, "nearest", refused=reason) for name, reason in reasons.items()]
            used: list[str] = []
        else:
            self._collect()
            tried = Trials(self._ground())
            found = explore(source, tried, known, rounding=self.request.rounding)
            trials, used = list(found.trials), [fold.name for fold in found.model.folds]
            tried.clear()
        write_text(self._record, json.dumps(used))
        return {"trials": [dataclasses.asdict(trial) for trial in trials], "used": used}

    @cached_property
    def _known(self) -> tuple[Transform, ...]:
        return transforms(nearest(self.request.type), seed=self.request.seed)

    def _ground(self) -> Ground:
        request = self.request
        return Ground(
            source=request.source,
            matrix=ImportanceMatrix.read(request.matrix),
            types=request.type,
            passages=passages(self._conversations(held_back=True), *request.roles),
            folder=request.folder / "trials",
            key=self.explored.key,
            backend=request.backend,
            progress=request.progress,
        )

    def _conversations(self, *, held_back: bool) -> Sequence[Conversation]:
        every = read(self.request.calibration)
        if len(every) < FEWEST:
            raise TooFewTexts(len(every))
        step = min(HELD_BACK, len(every) // 2)
        return [each for i, each in enumerate(every) if (i % step == step - 1) == held_back]

    @property
    def _hessians(self) -> Hessians:
        folder = self.request.folder / "hessians"
        folder.mkdir(parents=True, exist_ok=True)
        return Hessians(folder, self.explored.key)

    def _collect(self) -> None:
        """Moments of what the source's products read; layers that are there stay."""
        tokens = [conversation.tokens for conversation in self._conversations(held_back=False)]
        size = min(WINDOW, max(map(len, tokens)))
        windows = cut(tokens, size)
        network = Network.open(self.request.source)
        forward(network, windows, hessians=self._hessians, progress=self.request.progress)

    @cached_property
    def changed(self) -> Step:
        """The source under the changes that pay."""
        outputs = (self.file, self.matrix, self._means)
        return Step("transformed", self._change, {"version": VERSION}, (self.explored, *self.ready), outputs)

    def _change(self) -> Facts:
        used = json.loads(self._record.read_text("utf-8"))
        model = Folded.open(self.request.source, self._hessians)
        if used:
            self._collect()
        for name in used:
            transform = next(each for each in self._known if each.name == name)
            model = model.then(transform.fold(model))
        model.importance(ImportanceMatrix.read(self.request.matrix)).write(self.matrix)
        biased = [name for name in model if name.endswith(".bias") and name != "output.bias"]
        weights = [name.removesuffix("bias") + "weight" for name in biased if model.corrects]
        with whole(self._means) as partial:
            save_file({name: model.mean(name) for name in weights}, partial)
        self.file.unlink(missing_ok=True)
        if used:
            model.write(self.file, progress=self.request.progress)
        else:
            self.file.symlink_to(self.request.source.resolve())
        return {}

    def finish(self, made: Path) -> None:
        """Correct the biases of a file that was made from the changed source, where that pays."""
        if means := load_file(self._means):
            correct(self.file, made, means.__getitem__)

    def clear(self) -> None:
        """Remove what is large and no finished run needs again."""
        self.file.unlink(missing_ok=True)
        for folder in (self.request.folder / "hessians", self.request.folder / "trials"):
            shutil.rmtree(folder, ignore_errors=True)
