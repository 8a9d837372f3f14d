"""Leave out the layers that matter least: which, by divergences measured through the engine; and the file.

The trials run on a small copy of the source, in Q8_0: what its own rounding costs is in none of the figures,
as they are divergences from that same copy. Every trial is kept, so a run that was stopped goes on with the
next. The texts are the calibration's; held-out texts judge the result.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from engine.llama import default_threads
from models.gguf import Header, read_header
from quantize.calibration.conversation import read
from quantize.divergence import Estimate
from quantize.errors import QuantizeError
from quantize.gguf_files.child import quantize
from quantize.gguf_files.types import Order
from quantize.measure import Backend, Passage, measure, some, write_reference
from quantize.network.network import Network
from quantize.network.stream import cut
from quantize.steps import Facts, Step, write_text
from quantize.structure.influence import block_influences
from quantize.structure.pruned_file import Pruning, layer_elements
from quantize.structure.search import Asked, Rung, price, search

#: Scored tokens of a trial, and tokens that influences are measured on.
TRIAL_TOKENS = 1024
INFLUENCE_TOKENS = 2048
WINDOW = 128
#: Files that tell what smaller types cost, from large to small; llama.cpp's recipes, without importance.
RUNGS = ("Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_NL", "Q3_K_M", "Q2_K")
#: With `auto` so many layers stay.
LEAST_SHARE = 0.5

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True, slots=True)
class Request:
    """What is pruned and where: `copy` is the source in Q8_0, `out` the source without the layers.

    `target_bytes`: size of the smallest file that will be made, which `auto` compares at.
    """

    source: Path
    copy: Path
    out: Path
    folder: Path
    asked: Asked
    target_bytes: int
    backend: Backend
    passages: Callable[[], Sequence[Passage]]
    texts: Path
    progress: Progress
    allow_requantize: bool = False


class Layers:
    """The steps. `ready` are the source, its copy and the calibration."""

    def __init__(self, request: Request, ready: tuple[Step, Step, Step]) -> None:
        self.request = request
        self.ready = ready

    @cached_property
    def checked(self) -> Step:
        """Refuses, before anything takes long, what cannot be pruned."""
        return Step("layers", self._check, {"layers": self.request.asked}, self.ready[:1])

    def _check(self) -> Facts:
        header = Pruning.of(self.request.source, ()).header
        n_layer = int(header.hyperparameter("block_count") or 0)
        asked = self.request.asked
        if isinstance(asked, int):
            if asked > n_layer:
                raise QuantizeError(
                    f"--prune-layers is {asked}, and the model has {n_layer} layers; give fewer, or auto"
                )
            Pruning.of(self.request.source, range(asked))  # how many is what counts here
        return {"n_layer": n_layer}

    @cached_property
    def chosen(self) -> Step:
        """Which layers go, and all that was tried."""
        parameters = {
            "layers": self.request.asked,
            "tokens": (TRIAL_TOKENS, INFLUENCE_TOKENS, WINDOW),
            "target_bytes": self.request.target_bytes if self.request.asked == "auto" else None,
        }
        return Step("pruning", self._choose, parameters, (*self.ready, self.checked), (self._choice,))

    @property
    def _choice(self) -> Path:
        return self.request.folder / "layers.json"

    @cached_property
    def pruned(self) -> Step:
        """The source without the layers, or a link to all of it where none goes."""
        return Step("pruned", self._write, {}, (self.ready[0], self.chosen), (self.request.out,))

    def _write(self) -> Facts:
        dropped, out = json.loads(self._choice.read_text("utf-8")), self.request.out
        out.unlink(missing_ok=True)
        if dropped:
            Pruning.of(self.request.source, dropped).write(out)
        else:
            out.symlink_to(self.request.source.absolute())
        return {}

    def _choose(self) -> Facts:
        request = self.request
        request.folder.mkdir(parents=True, exist_ok=True)
        texts = Step("trials", dict, {"tokens": (TRIAL_TOKENS, INFLUENCE_TOKENS, WINDOW)}, self.ready)
        trials = _Trials(request, texts.key)
        header = read_header(request.copy)
        n_layer = Pruning.of(request.copy, ()).n_layer
        asked, found, pays, target = request.asked, None, _always, request.target_bytes
        if asked == "auto":
            rungs = trials.rungs()
            target = max(target, min(rung.size_bytes for rung in rungs))  # rows may fit no smaller type
            found = price(rungs, target)
            saved = _bytes_a_layer(header, n_layer, target)
            pays = (lambda _: False) if found is None else (lambda nats: nats < found.nats_per_byte * saved)
        most = asked if isinstance(asked, int) else int(n_layer * (1 - LEAST_SHARE))
        rounds = search(n_layer, most, trials.influences, trials.cost, pays=pays)
        trials.clear()
        dropped = [one.taken for one in rounds if one.taken is not None]
        write_text(self._choice, json.dumps(dropped))
        return {
            "asked": asked,
            "n_layer": n_layer,
            "rounds": [dataclasses.asdict(one) for one in rounds],
            "price": dataclasses.asdict(found) if found else None,
            "bytes_a_layer": _bytes_a_layer(header, n_layer, target),
            "share_a_layer": layer_elements(header, range(n_layer)) / n_layer / header.n_parameters,
        }


def _always(_nats: float) -> bool:
    return True


def _bytes_a_layer(header: Header, n_layer: int, target_bytes: int) -> float:
    """What leaving out one layer saves in a file of `target_bytes`."""
    return target_bytes * layer_elements(header, range(n_layer)) / n_layer / header.n_parameters


class _Trials:
    """Measures models without some layers, and remembers each result in a file."""

    def __init__(self, request: Request, key: str) -> None:
        self.request = request
        self.path = request.folder / f"trials-{key[:16]}.json"
        self.results: dict[str, list[float | None]] = {}
        if self.path.is_file():
            self.results = json.loads(self.path.read_text("utf-8"))
        self._passages: list[Passage] | None = None

    def influences(self, layers: Sequence[int]) -> list[float]:
        """Of these layers, the others left out."""
        self.request.progress("ranking the layers", 0, None)
        tokens = [conversation.tokens for conversation in read(self.request.texts)]
        windows = cut(tokens, WINDOW, limit=INFLUENCE_TOKENS)
        return block_influences(Network.open(self.request.copy), windows, layers)

    def cost(self, dropped: frozenset[int]) -> Estimate:
        """Mean KLD without these layers."""
        name = ",".join(str(layer) for layer in sorted(dropped))

        def write(out: Path) -> None:
            Pruning.of(self.request.copy, dropped).write_plainly(out)

        return self._measured(name, f"without the layers {name}", write)[0]

    def rungs(self) -> list[Rung]:
        """The source in one type after the other, down to the first below the size that counts."""
        found = [Rung("Q8_0", self.request.copy.stat().st_size, 0.0)]
        for kind in RUNGS:
            if found[-1].size_bytes < self.request.target_bytes:
                break

            def write(out: Path, kind: str = kind) -> None:
                threads = self.request.backend.n_threads or default_threads()
                allowed = self.request.allow_requantize
                quantize(Order(self.request.source, out, kind, n_threads=threads, allow_requantize=allowed))

            kl, size = self._measured(kind, f"all layers as {kind}", write)
            found.append(Rung(kind, size, kl.mean))
        return found

    def _measured(self, name: str, told: str, write: Callable[[Path], None]) -> tuple[Estimate, int]:
        """Mean KLD to the copy, and bytes, of what `write` makes."""
        if name not in self.results:
            self.request.progress("trying to leave out layers: " + told, len(self.results), None)
            out = self.request.folder / "try.gguf"
            write(out)
            kl = measure(out, self._texts(), self._reference, backend=self.request.backend).kl
            self.results[name] = [kl.mean, kl.standard_error, out.stat().st_size]
            out.unlink()
            write_text(self.path, json.dumps(self.results))
        mean, error, size = self.results[name]
        return Estimate(float(mean or 0.0), error), int(size or 0)

    @property
    def _reference(self) -> Path:
        return self.request.folder / "reference.f32"

    def _texts(self) -> list[Passage]:
        """What is scored; the copy's own predictions of it are made on the way."""
        if self._passages is None:
            self._passages = some(self.request.passages(), TRIAL_TOKENS)
            write_reference(self.request.copy, self._passages, self._reference, backend=self.request.backend)
        return self._passages

    def clear(self) -> None:
        """Remove what is large."""
        self._reference.unlink(missing_ok=True)
